"""A `cwpo up` with a real, small annotator, and a file of good and bad rows to annotate."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from cwpo import Triplet
from harness import Up, labels_of

GOOD = [
    {"id": "x1", "prompt": "why cat", "response_a": "because 🐈", "response_b": "no"},
    {"id": 7, "prompt": "thanks", "response_a": "please", "response_b": "sorry " * 9},
    {"prompt": "the word", "chosen": "same", "rejected": "same"},
]
LINES = [
    json.dumps(GOOD[0]),
    "{not json",
    json.dumps({"id": "empty", "prompt": "p", "response_a": " ", "response_b": "b"}),
    json.dumps(GOOD[1], ensure_ascii=False),
    json.dumps({"id": "long", "prompt": "cat " * 500, "response_a": "a", "response_b": "b"}),
    json.dumps({"id": "half", "prompt": "p"}),
    json.dumps(GOOD[2]),
]
REASONS = [
    (2, None, "invalid_row"),
    (3, "empty", "empty_response"),
    (5, "long", "too_long"),
    (6, "half", "invalid_row"),
]


@pytest.fixture(scope="package")
def up(tiny_annotator, tmp_path_factory):
    """The url of a `cwpo up`; SIGTERM ends it with exit code 0."""
    flags = ("--annotator", str(tiny_annotator), "--workers", "1", "--device", "cpu")
    running = Up(tmp_path_factory.mktemp("up"), *flags)
    yield running.url
    running.stop(signal.SIGTERM)
    assert running.process.returncode == 0


@pytest.fixture
def cwpo(up):
    """`cwpo("jobs", "list")`: the command, run against the service."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "cwpo", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "CWPO_URL": up},
        )

    return run


@pytest.fixture
def good():
    """Three rows that can be annotated; the third is a tie, and has no id."""
    return [dict(row) for row in GOOD]


@pytest.fixture
def messy(tmp_path):
    """A file of seven rows, the three good ones among them."""
    path = tmp_path / "triplets.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture
def check_outputs(tiny_annotator):
    """`check_outputs(output)`: the file holds the labels of `messy`, the one beside it the rest."""

    def check(output):
        rows = pq.read_table(output).to_pylist()
        assert [row["id"] for row in rows] == ["x1", "7", "7"]
        names = ("prompt", "response_a", "response_b")
        triplets = [Triplet(**{name: good[name] for name in names}) for good in GOOD[:2]]
        for row, label in zip(rows, labels_of(triplets, tiny_annotator), strict=False):
            scores = sorted((label.score_a, label.score_b), reverse=True)
            np.testing.assert_allclose(
                [row["score_chosen"], row["score_rejected"]], scores, atol=1e-4
            )
            assert row["confidence"] == pytest.approx(
                np.tanh((scores[0] - scores[1]) / 2), abs=1e-4
            )
        assert rows[2]["preferred"] == "tie"
        lines = output.with_suffix(".errors.jsonl").read_text().splitlines()
        errors = [json.loads(line) for line in lines]
        assert [(error["row"], error["id"], error["code"]) for error in errors] == REASONS
        assert all(error["detail"] for error in errors)

    return check
