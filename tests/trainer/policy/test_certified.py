"""Alignment on the labels that a certificate of the annotator is of."""

from __future__ import annotations

import numpy as np
import pytest

from cwpo.datasets.weighted import weighted_writer
from cwpo.errors import DatasetError
from cwpo.types import Certificate
from cwpo_trainer.commands import Align
from cwpo_trainer.data.weighted import read_weighted, weights_of
from cwpo_trainer.run.folder import read_record

from ..samples import weighted, write_lines

CERTIFICATE = Certificate(
    max_error=0.1, delta=0.05, threshold=0.5, coverage=0.5, pairs=200, errors=12
)
SMALL = (
    *("--batch-size", 4, "--gradient-accumulation", 1, "--max-steps", 1, "--dtype", "float32"),
    *("--weight", "certified"),
)


@pytest.fixture
def rows():
    return [row | {"certified": row["confidence"] > 0.5} for row in weighted(16)]


@pytest.fixture
def data(rows, tmp_path):
    path = tmp_path / "weighted.parquet"
    with (
        path.open("wb") as sink,
        weighted_writer(sink, "parquet", None, (), CERTIFICATE) as writer,
    ):
        writer.write(rows)
    return path


def test_certified_pairs_alone_are_trained_on(rows, data, tiny_causal, tmp_path, command):
    output = tmp_path / "out"
    command(Align, *SMALL, "--model", tiny_causal, "--data", data, "--output", output)
    results = read_record(output).results
    assert (results["pairs"], results["mean_weight"]) == (sum(r["certified"] for r in rows), 1)


def test_epsilon_is_the_error_that_the_certificate_measured(data, tiny_causal, tmp_path, command):
    output = tmp_path / "out"
    flags = ("--model", tiny_causal, "--data", data, "--output", output, "--loss", "rdpo")
    command(Align, *SMALL, *flags, "--epsilon", "auto")
    assert read_record(output).settings["epsilon"] == 12 / 200


def test_what_no_certificate_is_of_is_refused(rows, data, tiny_causal, tmp_path, failure):
    lines = write_lines(tmp_path / "weighted.jsonl", rows)
    flags = (*SMALL, "--model", tiny_causal, "--output", tmp_path / "out")
    message = failure(Align, *flags, "--data", lines, "--loss", "rdpo", "--epsilon", "auto")
    assert "does not say how many certified labels are wrong" in message
    plain = write_lines(tmp_path / "plain.jsonl", weighted(4))
    message = failure(Align, *flags, "--data", plain)
    assert "no column certified; `cwpo annotate --max-error` writes it" in message
    none = write_lines(tmp_path / "none.jsonl", [row | {"certified": False} for row in rows])
    assert "none of 16 labels is certified" in failure(Align, *flags, "--data", none)
    message = failure(Align, *flags, "--data", plain, "--labels", "human")
    assert "leave --weight out" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--loss", "rdpo", "--epsilon", "auto"), "add --weight certified"),
        (("--loss", "rdpo", "--epsilon", "soon"), "--epsilon: Input should be a valid number"),
        (("--loss", "rdpo", "--epsilon", "0.5"), "--epsilon: Input should be less than 0.5"),
        (("--loss", "dpo", "--weight", "certified", "--epsilon", "auto"), "--epsilon belongs to"),
    ],
)
def test_an_epsilon_that_cannot_be_is_refused(flags, message, failure):
    assert message in failure(Align, "--model", "m", "--data", "d", "--output", "o", *flags)


def test_a_column_that_is_none_or_not_whole_is_refused(rows, tmp_path):
    odd = write_lines(tmp_path / "odd.jsonl", [*rows[:2], rows[2] | {"certified": "yes"}])
    with pytest.raises(DatasetError, match="row 3: certified is true or false, not 'yes'"):
        [*read_weighted(odd)]
    part = write_lines(tmp_path / "part.jsonl", [*rows[:2], *weighted(1)])
    with pytest.raises(DatasetError, match="2 of 3 rows have certified"):
        [*read_weighted(part)]


def test_the_weight_by_hand():
    confidences = np.array([0.9, 0.9], np.float32)
    made = weights_of(confidences, "certified", normalise=True, certified=np.array([True, False]))
    assert made.tolist() == [1, 0]
