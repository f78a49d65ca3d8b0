"""The weighted dataset as it is written, for TRL to read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo import Annotation, Message, Triplet
from cwpo.columns import Column
from cwpo.datasets.weighted import (
    certificate_in,
    columns_beside,
    weighted_row,
    weighted_writer,
)
from cwpo.types import Certificate, ModelRef

GOOD = {"id": "x", "prompt": "p", "response_a": "a", "response_b": "b"}


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


CERTIFICATE = Certificate(
    max_error=0.1, delta=0.05, threshold=0.5, coverage=0.3, pairs=300, errors=12
)


def test_a_certificate_adds_a_column_and_is_in_the_metadata(tmp_path):
    triplet = Triplet(**GOOD)
    labels = [annotation("a", confidence=0.625), annotation("b"), annotation("tie", confidence=0.0)]
    rows = [weighted_row(triplet, label, {"note": 1}, 2, CERTIFICATE) for label in labels]
    assert [row["certified"] for row in rows] == [True, False, False]
    path, note = tmp_path / "weighted.parquet", Column(name="note", type="integer")
    with (
        path.open("wb") as sink,
        weighted_writer(sink, "parquet", None, [note], CERTIFICATE) as writer,
    ):
        writer.write(rows)
    table = pq.read_table(path)
    assert table.to_pylist() == rows
    assert table.schema.field("certified").type == pa.bool_()
    assert certificate_in(table.schema) == CERTIFICATE
    assert columns_beside(table.schema) == [note]
    assert "certified" not in weighted_row(triplet, labels[0])
