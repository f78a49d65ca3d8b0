"""Trainings that SIGTERM stopped under 0.1 go on today to what they would have come to then."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from cwpo.cli import main

OPTIMISATION = ("--learning-rate", "3e-2", "--dtype", "float32", "--threads", "1")
STOPPED = {
    "annotator": (
        *("train-annotator", "--model", "model", "--data", "labelled.jsonl", *OPTIMISATION),
        *("--batch-size", "6", "--max-length", "96", "--validate-every", "4"),
        *("--max-steps", "24", "--seed", "2"),
    ),
    "align": (
        *("align", "--model", "model", "--data", "weighted.parquet", *OPTIMISATION),
        *("--batch-size", "3", "--gradient-accumulation", "2", "--warmup-steps", "2"),
        *("--max-steps", "24"),
    ),
}


@pytest.fixture
def cwpo(old, monkeypatch):
    """The command, in the folder of what 0.1 wrote."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cwpo", *map(str, arguments)])
        main()

    return run


def log_of(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", STOPPED)
def test_a_stopped_training_goes_on_to_the_same_end(kind, old, cwpo):
    output, whole = old / f"resumed-{kind}", old / f"whole-{kind}"
    stopped = log_of(old / f".resumed-{kind}.partial")
    cwpo(*STOPPED[kind], "--output", output.name, "--resume")
    steps, expected = log_of(output), log_of(whole)
    assert steps[: len(stopped)] == stopped
    assert [line["step"] for line in steps] == [line["step"] for line in expected]
    for now, then in zip(steps, expected, strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-3)
        assert now["lr"] == pytest.approx(then["lr"])
    weights, wanted = (load_file(path / "model.safetensors") for path in (output, whole))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_a_dataset_of_then_trains_under_the_annotator_that_wrote_it(old, cwpo):
    flags = ("align", "--model", "model", "--data", "weighted.parquet", *OPTIMISATION)
    cwpo(*flags, "--annotator", "annotator-bt", "--output", "aligned", "--max-steps", 1)
    assert len(log_of(old / "aligned")) == 1
    with pytest.raises(SystemExit, match=r"annotator"):
        cwpo(*flags, "--annotator", "annotator-dpo", "--output", "other", "--max-steps", 1)


def test_a_report_is_drawn_of_a_run_of_then(old, cwpo):
    cwpo("report", "annotator-bt")
    assert "annotator-bt" in (old / "annotator-bt" / "report.html").read_text()
