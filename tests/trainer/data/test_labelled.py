from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.errors import DatasetError
from cwpo.types import Message
from cwpo_trainer.data.labelled import LabelledPair, fingerprint, pairs_of, read_pairs

ROWS = [
    {"id": "x", "prompt": "p1", "response_a": "good", "response_b": "bad", "preferred": "a"},
    {"id": "y", "prompt": "p2", "response_a": "bad", "response_b": "good", "preferred": "b"},
]
EXPECTED = [LabelledPair("x", "p1", "good", "bad"), LabelledPair("y", "p2", "good", "bad")]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_reads_jsonl_gzip_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert read_pairs(str(tmp_path / name)) == EXPECTED


def test_reading_many_rows_shows_how_many_there_are(tmp_path, capsys):
    (tmp_path / "many.jsonl").write_bytes(lines(ROWS) * 12_500)
    assert len(read_pairs(str(tmp_path / "many.jsonl"))) == 25_000
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("read many.jsonl: 10,000 rows")
    assert last.startswith("read many.jsonl: 25,000 rows")


def test_reads_chosen_and_rejected(tmp_path):
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"}]
    assert [*pairs_of(enumerate(rows, 1), "x")] == [LabelledPair("1", "p", "good", "bad")]


def test_cuts_whole_transcripts_at_the_last_shared_turn():
    start = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: help\n\nAssistant:"
    row = {"chosen": f"{start} Sure, I can.", "rejected": f"{start} Sorry."}
    (pair,) = pairs_of([(1, row)], "x")
    assert pair == LabelledPair("1", start, " Sure, I can.", " Sorry.")


def test_transcripts_that_part_earlier_keep_their_later_turns():
    row = {
        "chosen": "\n\nHuman: hi\n\nAssistant: Yes.\n\nHuman: so\n\nAssistant: Good.",
        "rejected": "\n\nHuman: hi\n\nAssistant: No.\n\nHuman: so\n\nAssistant: Good.",
    }
    (pair,) = pairs_of([(1, row)], "x")
    assert pair.prompt == "\n\nHuman: hi\n\nAssistant:"
    assert pair.rejected == " No.\n\nHuman: so\n\nAssistant: Good."


def test_cuts_whole_conversations_before_the_last_message():
    question = {"role": "user", "content": "why"}
    row = {
        "prompt": "why",
        "chosen": [question, {"role": "assistant", "content": "because"}],
        "rejected": [question, {"role": "assistant", "content": "no"}],
    }
    (pair,) = pairs_of([(1, row)], "x")
    assert pair == LabelledPair("1", [Message(role="user", content="why")], "because", "no")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "p", "response_a": "a", "response_b": "b"}, "preferred"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "empty"),
        ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt"),
        ("not JSON", "not JSON"),
    ],
)
def test_a_bad_row_refuses_the_file(bad, reason):
    with pytest.raises(DatasetError, match=f"file: row 7: .*{reason}"):
        [*pairs_of([(1, ROWS[0]), (7, bad)], "file")]


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./a/b.jsonl", "/a/b", "owner/x/"])
def test_a_missing_file_is_said(source):
    with pytest.raises(DatasetError, match="no such file"):
        read_pairs(source)


def test_an_empty_file_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DatasetError, match="holds no pairs"):
        read_pairs(str(tmp_path / "a.jsonl"))


def test_fingerprint_tells_data_apart():
    again = [LabelledPair("other", "p1", "good", "bad"), EXPECTED[1]]
    assert fingerprint(EXPECTED) == fingerprint(again)
    assert fingerprint(EXPECTED) != fingerprint(EXPECTED[::-1])
