"""Bad rows and ties, which every command that reads pairs or prompts goes without."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.errors import DatasetError
from cwpo_trainer.commands import Align, EvaluateAnnotator, Sft, TrainAnnotator
from cwpo_trainer.data.labelled import pairs_of, read_pairs
from cwpo_trainer.data.prompts import read_prompts
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, weighted, write_lines

EMPTY = {"id": "e", "prompt": "p", "response_a": "good", "response_b": "", "preferred": "a"}
UNLABELLED = {"prompt": "p", "response_a": "good", "response_b": "bad", "preferred": None}
TIES = (
    {"prompt": "p", "response_a": "good", "response_b": "bad", "preferred": "tie"},
    {"prompt": "p", "chosen": "same", "rejected": "same"},
)


def listed(unused, folder):
    unused.write(folder)
    return read_lines(folder / "rejected.jsonl")


def test_bad_rows_are_skipped_counted_and_listed(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [*pairs(96), EMPTY])
    with path.open("a") as sink:
        sink.write('{"prompt": \n\n' + json.dumps(UNLABELLED) + "\n")
    unused = UnusedRows(0.05)
    assert len(read_pairs(str(path), unused)) == 96
    assert unused.rejected == {"invalid_row": 2, "empty_response": 1}
    empty, cut, unlabelled = listed(unused, tmp_path)
    assert empty == {
        "row": 97,
        "id": "e",
        "code": "empty_response",
        "detail": "response_b is empty",
        "content": EMPTY,
    }
    assert (cut["row"], cut["id"], cut["code"]) == (98, None, "invalid_row")
    assert "content" not in cut
    assert (unlabelled["row"], unlabelled["id"]) == (100, "100")
    assert "preferred" in unlabelled["detail"]


def test_more_bad_rows_than_the_share_are_refused_with_the_first_and_the_flag():
    rows = [*pairs(97), EMPTY, *pairs(1), UNLABELLED]
    assert len([*pairs_of(enumerate(rows, 1), "file", UnusedRows(0.02))]) == 98
    message = (
        r"file: row 98: response_b is empty; 2 of 100 rows are rejected, a larger share than "
        r"--max-rejected-share 0\.01 allows"
    )
    with pytest.raises(DatasetError, match=message):
        [*pairs_of(enumerate(rows, 1), "file", UnusedRows(0.01))]


def test_ties_are_left_out_but_not_bad(capsys, tmp_path):
    unused = UnusedRows()
    rows = [*TIES, *pairs(1), *TIES]
    assert len([*pairs_of(enumerate(rows, 1), "file", unused)]) == 1
    assert (unused.rows, unused.ties) == (5, 4)
    assert listed(unused, tmp_path) == []
    unused.tell(are_listed=True)
    assert capsys.readouterr().err == (
        "4 of 5 rows left out: ties, in which no response is preferred\n"
    )


def test_a_file_without_a_column_fails_before_it_is_read_to_its_end():
    read = []

    def rows():
        for number in range(1, 5000):
            read.append(number)
            yield number, {"question": "why", "chosen": "a", "rejected": "b"}

    with pytest.raises(DatasetError, match=r"row 1: prompt is missing.* none of the first 1,000"):
        [*pairs_of(rows(), "file", UnusedRows(0.5))]
    assert len(read) == 1000


def test_what_json_does_not_know_is_listed_as_text(tmp_path):
    now = datetime(2026, 1, 2, tzinfo=UTC)
    row = {"prompt": "p", "chosen": "a", "rejected": " ", "at": now, "share": math.nan}
    unused = UnusedRows(1)
    [*pairs_of(enumerate([row, *pairs(1)], 1), "file", unused)]
    (line,) = listed(unused, tmp_path)
    assert line["content"] == row | {"at": "2026-01-02 00:00:00+00:00", "share": None}


def test_half_of_a_surrogate_pair_is_listed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n')
    write_lines(tmp_path / "good.jsonl", pairs(1))
    with path.open("a") as sink:
        sink.write((tmp_path / "good.jsonl").read_text())
    unused = UnusedRows(0.5)
    read_pairs(str(path), unused)
    (line,) = listed(unused, tmp_path)
    assert (line["code"], line["content"]["prompt"]) == ("invalid_text", "\ud800")


def test_bad_prompts_are_skipped_too(tmp_path):
    rows = [{"prompt": "hello"}, {"question": "why"}, {"prompt": 3}, {"prompt": "more"}]
    unused = UnusedRows(0.5)
    assert read_prompts(write_lines(tmp_path / "p.jsonl", rows), unused) == ["hello", "more"]
    assert unused.rejected == {"invalid_row": 2}
    with pytest.raises(DatasetError, match=r"row 2: prompt is missing; 2 of 4 rows .*-share 0\.4"):
        read_prompts(tmp_path / "p.jsonl", UnusedRows(0.4))


def test_parquet_that_is_no_parquet_fails_whatever_the_share(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(DatasetError, match="Parquet"):
        read_pairs(str(tmp_path / "x.parquet"), UnusedRows(1))


SMALL = ("--epochs", 1, "--dtype", "float32", "--threads", 1, "--max-steps", 1)
SMALL_POLICY = (*SMALL, "--batch-size", 4, "--gradient-accumulation", 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Sft, Align])
def test_policies_are_trained_on_the_other_rows(kind, tiny_causal, tmp_path, command, capsys):
    """Of a dataset as jobs write it, with a tie, and one row that was spoilt later."""
    rows = weighted(30)
    rows[3] |= {"preferred": "tie", "confidence": 0.0}
    rows[5] |= {"rejected": ""}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "weighted.parquet")
    other = write_lines(tmp_path / "other.jsonl", [*weighted(9), {"prompt": "p"}])
    output = tmp_path / "out"
    flags = ("--model", tiny_causal, "--data", tmp_path / "weighted.parquet", "--output", output)
    more = ("--eval-data", other, "--max-rejected-share", 0.1)
    command(kind, *flags, *SMALL_POLICY, *more)
    printed = capsys.readouterr().err
    assert "1 of 30 rows rejected: 1 empty_response; see rejected.jsonl in --output\n" in printed
    assert "1 of 30 rows left out: ties" in printed
    results = read_record(output).results
    assert (results["pairs"], results["eval_pairs"]) == (28, 9)
    assert (results["rejected"], results["ties"]) == ({"empty_response": 1}, 1)
    assert (results["eval_rejected"], results["eval_ties"]) == ({"invalid_row": 1}, 0)
    assert [line["row"] for line in read_lines(output / "rejected.jsonl")] == [6]
    assert [line["row"] for line in read_lines(output / "eval_rejected.jsonl")] == [10]


@pytest.mark.slow
def test_annotators_are_trained_and_measured_on_the_other_rows(
    tiny_causal, tmp_path, command, failure
):
    data = write_lines(tmp_path / "pairs.jsonl", [*pairs(58), EMPTY, TIES[0]])
    output, measured = tmp_path / "out", tmp_path / "measured"
    flags = ("--model", tiny_causal, "--data", data, "--output", output, *SMALL)
    assert "row 59: response_b is empty" in failure(TrainAnnotator, *flags)
    command(TrainAnnotator, *flags, "--max-rejected-share", 0.02)
    flags = (output, "--data", data, "--output", measured)
    assert "pairs are of conversations that this annotator was trained" in failure(
        EvaluateAnnotator, *flags, "--max-rejected-share", 0.02
    )
    others = [row | {"prompt": f"and {row['prompt']}"} for row in pairs(58)]
    write_lines(data, [*others, EMPTY, TIES[0]])
    assert "--max-rejected-share" in failure(EvaluateAnnotator, *flags)
    command(EvaluateAnnotator, *flags, "--max-rejected-share", 0.02)
    for folder in (output, measured):
        results = read_record(folder).results
        assert (results["rejected"], results["ties"]) == ({"empty_response": 1}, 1)
        (line,) = read_lines(folder / "rejected.jsonl")
        assert line["content"] == EMPTY
