import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo import Annotation, Message, Triplet
from cwpo.datasets import (
    NumberedTriplet,
    RejectedRow,
    file_format,
    read_triplets,
    weighted_row,
    weighted_writer,
)
from cwpo.errors import DatasetError
from cwpo.types import ModelRef

GOOD = {"id": "x", "prompt": "p", "response_a": "a", "response_b": "b"}


def read(*lines: object, format="jsonl"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return list(read_triplets(io.BytesIO(text.encode("utf-8", "surrogatepass")), format))


def test_our_names_and_those_of_trl_are_read_alike():
    ours, trl = read(GOOD, {"id": "x", "prompt": "p", "chosen": "a", "rejected": "b"})
    assert ours.triplet == trl.triplet == Triplet(**GOOD)
    assert (ours.row, trl.row) == (1, 2)


def test_conversational_trl_rows_are_read():
    (row,) = read(
        {
            "prompt": [{"role": "user", "content": "p"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    )
    assert row.triplet.prompt == [Message(role="user", content="p")]
    assert (row.triplet.response_a, row.triplet.response_b) == ("a", "b")


def test_ids_default_to_the_row_number_and_numbers_become_text():
    without = {key: value for key, value in GOOD.items() if key != "id"}
    assert [row.triplet.id for row in read(without, GOOD | {"id": 7})] == ["1", "7"]


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("{not json", "invalid_row", "not JSON"),
        ("[1, 2]", "invalid_row", "an array"),
        ("3", "invalid_row", "a number"),
        ('{"x": ' + "9" * 5000 + "}", "invalid_row", "too many digits"),
        ({"id": "x", "prompt": "p", "response_a": "a"}, "invalid_row", "response_b is missing"),
        ({"prompt": "p"}, "invalid_row", "chosen is missing"),
        (GOOD | {"prompt": None}, "invalid_row", "prompt is missing"),
        (GOOD | {"response_a": 5}, "invalid_row", "response_a"),
        (GOOD | {"response_b": " \n\t"}, "empty_response", "response_b is empty"),
        (GOOD | {"prompt": []}, "invalid_row", "prompt"),
        (GOOD | {"prompt": [{"role": "robot", "content": "x"}]}, "invalid_row", "role"),
        (GOOD | {"response_a": "\ud83d"}, "invalid_text", "response_a holds half"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line_and_reason(line, code, reason):
    before, bad, after = read(GOOD, line, GOOD)
    assert isinstance(before, NumberedTriplet)
    assert isinstance(after, NumberedTriplet)
    assert isinstance(bad, RejectedRow)
    assert (bad.row, bad.error.code) == (2, code)
    assert reason in bad.error.detail


def test_lines_that_are_not_utf8_are_rejected_alone():
    data = json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n' + json.dumps(GOOD).encode()
    first, bad, last = read_triplets(io.BytesIO(data), "jsonl")
    assert "UTF-8" in bad.error.detail
    assert (first.row, last.row) == (1, 3)


def test_blank_lines_are_no_rows_but_count_as_lines():
    assert [row.row for row in read(GOOD, "", "   ", GOOD, "")] == [1, 4]


def test_text_and_chat_prompts_do_not_mix():
    chat = GOOD | {"prompt": [{"role": "user", "content": "p"}]}
    first, second, third = read(GOOD, chat, GOOD)
    assert isinstance(first, NumberedTriplet)
    assert isinstance(third, NumberedTriplet)
    assert "split the file" in second.error.detail


def test_gzip_is_read_and_a_cut_file_is_an_error():
    data = gzip.compress("\n".join(json.dumps(GOOD) for _ in range(1000)).encode())
    assert len(list(read_triplets(io.BytesIO(data), "jsonl.gz"))) == 1000
    with pytest.raises(DatasetError, match="gzip"):
        list(read_triplets(io.BytesIO(data[:-20]), "jsonl.gz"))


def test_parquet_is_read_and_anything_else_under_that_name_is_an_error():
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD | {"response_a": None}]), sink)
    good, bad = read_triplets(io.BytesIO(sink.getvalue()), "parquet")
    assert good.triplet == Triplet(**GOOD)
    assert "response_a is missing" in bad.error.detail
    with pytest.raises(DatasetError, match="Parquet"):
        list(read_triplets(io.BytesIO(b"no parquet"), "parquet"))


def test_a_name_of_no_known_format_is_refused():
    assert file_format(Path("A.JSONL.GZ")) == "jsonl.gz"
    with pytest.raises(DatasetError, match=r"data\.csv"):
        file_format(Path("data.csv"))


def annotation(preferred, **changes):
    fields = {"id": "x", "confidence": 0.5, "score_a": 1.0, "score_b": 2.0, "truncated": False}
    return Annotation(preferred=preferred, **(fields | changes))


def test_the_preferred_response_is_chosen_and_a_tie_keeps_a():
    triplet = Triplet(**GOOD)
    row = weighted_row(triplet, annotation("b"))
    assert (row["chosen"], row["rejected"]) == ("b", "a")
    assert (row["score_chosen"], row["score_rejected"]) == (2.0, 1.0)
    tie = weighted_row(triplet, annotation("tie", confidence=0.0, score_a=2.0))
    assert (tie["chosen"], tie["preferred"]) == ("a", "tie")


@pytest.mark.parametrize("prompt", ["p 🐈", [Message(role="user", content="p")]])
@pytest.mark.parametrize("calibrated", [None, 0.25])
def test_what_is_written_loads_in_datasets_as_trl_wants_it(tmp_path, prompt, calibrated):
    from datasets import load_dataset

    triplet = Triplet(id="x", prompt=prompt, response_a="a", response_b="b")
    row = weighted_row(triplet, annotation("a", calibrated_confidence=calibrated))
    for format, loader in (("parquet", "parquet"), ("jsonl", "json")):
        path = tmp_path / f"weighted.{format}"
        with (
            path.open("wb") as sink,
            weighted_writer(sink, format, ModelRef(name="m", revision="r")) as writer,
        ):
            writer.write([row])
            writer.write([row])
        loaded = load_dataset(loader, data_files=str(path), split="train", cache_dir=str(tmp_path))
        assert loaded[:]["id"] == ["x", "x"]
        assert loaded[1] == row
    metadata = pq.read_schema(tmp_path / "weighted.parquet").metadata
    assert json.loads(metadata[b"cwpo.annotator"]) == {"name": "m", "revision": "r"}


def test_a_dataset_without_rows_is_still_a_dataset(tmp_path):
    path = tmp_path / "weighted.parquet"
    with path.open("wb") as sink, weighted_writer(sink, "parquet"):
        pass
    assert pq.read_table(path).num_rows == 0
