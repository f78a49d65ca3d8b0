"""Annotators of 0.1 say today what they said then, and what they annotated still trains."""

import json

import pyarrow.parquet as pq
import pytest

from cwpo import Annotation, Triplet
from cwpo.datasets.weighted import weighted_row
from cwpo.types import ModelRef
from cwpo_annotator import Annotator


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def triplets(old):
    return [Triplet(**row) for row in lines(old / "triplets.jsonl")]


@pytest.mark.parametrize("name", ["annotator-bt", "annotator-dpo"])
def test_annotators_say_what_they_said(name, old, triplets):
    said = [Annotation(**row) for row in lines(old / f"{name}.annotations.jsonl")]
    says = Annotator.load(str(old / name), dtype="float32").annotate(triplets[: len(said)])
    assert [label.id for label in says] == [label.id for label in said]
    for now, then in zip(says, said, strict=True):
        assert (now.preferred, now.truncated) == (then.preferred, then.truncated)
        for field in ("score_a", "score_b", "confidence", "calibrated_confidence"):
            value = getattr(then, field)
            assert getattr(now, field) == pytest.approx(value, abs=2e-4), field
    assert {label.preferred for label in said} == {"a", "b"}


def test_the_dataset_of_the_same_triplets_is_the_same(old, triplets):
    was = pq.read_table(old / "weighted.parquet")
    assert was.to_pylist() == lines(old / "weighted.jsonl")
    annotator = Annotator.load(str(old / "annotator-bt"), dtype="float32")
    labels = annotator.annotate(triplets)
    rows = [weighted_row(*pair) for pair in zip(triplets, labels, strict=True)]
    for now, then in zip(rows, was.to_pylist(), strict=True):
        assert now == pytest.approx(then, abs=2e-4)
    kept = {name.decode(): value.decode() for name, value in was.schema.metadata.items()}
    written_by = ModelRef.model_validate_json(kept["cwpo.annotator"])
    assert written_by.name == annotator.model.name
    assert annotator.has_revision(written_by.revision)
