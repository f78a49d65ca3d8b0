from __future__ import annotations

from cwpo_trainer.run.chunks import chunks, counted


def test_chunks_hold_every_item_once_and_say_how_far_they_are(capsys):
    made = list(chunks(range(7), 3, work="score", unit="pairs"))
    assert [list(chunk) for chunk in made] == [[0, 1, 2], [3, 4, 5], [6]]
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("score: 3 of 7 pairs")
    assert last.startswith("score: 7 of 7 pairs")


def test_short_work_is_quiet(capsys):
    assert list(chunks([1, 2], 3, work="score", unit="pairs")) == [[1, 2]]
    assert capsys.readouterr().err == ""


def test_a_source_of_unknown_length_is_counted(capsys):
    assert list(counted(iter(range(8)), 3, work="read it", unit="rows")) == [*range(8)]
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("read it: 3 rows")
    assert last.startswith("read it: 8 rows")


def test_a_short_source_is_quiet(capsys):
    assert list(counted(iter([1, 2]), 3, work="read it", unit="rows")) == [1, 2]
    assert capsys.readouterr().err == ""
