"""The weights with the lowest evaluation loss, and stopping when it rises."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.run.folder import last_checkpoint, read_lines, read_record

from ..samples import weighted, write_lines
from ..stopping import stopped_after

pytestmark = pytest.mark.slow

STEPS, EVERY = 16, 2


@pytest.fixture
def flags(tiny_causal, tmp_path):
    """A training that soon worsens on pairs that are labelled the other way."""
    data = write_lines(tmp_path / "weighted.jsonl", weighted(8))
    swapped = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in weighted(8, seed=5)
    ]
    other = write_lines(tmp_path / "other.jsonl", swapped)
    return (
        *("--model", tiny_causal, "--data", data, "--eval-data", other, "--eval-steps", EVERY),
        *("--dtype", "float32", "--threads", 1, "--batch-size", 4, "--gradient-accumulation", 1),
        *("--schedule", "constant", "--learning-rate", 3e-2),
    )


def evaluations(output):
    lines = read_lines(output / "training.jsonl")
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def weights(output):
    (path,) = output.glob("*model.safetensors")
    return load_file(path)


def assert_same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize(
    ("kind", "more"),
    [(Sft, ()), (Sft, ("--lora", "--adapter-only")), (Align, ()), (Align, ("--lora",))],
)
def test_the_best_weights_are_kept_also_where_they_are_not_the_last(
    kind, more, flags, tmp_path, command, capsys
):
    flags = (*flags, *more)
    command(kind, *flags, "--keep-best", "--max-steps", STEPS, "--output", tmp_path / "best")
    of_steps = evaluations(tmp_path / "best")
    best = min(of_steps, key=of_steps.get)
    assert [*of_steps] == [*range(EVERY, STEPS + 1, EVERY)]
    assert best < STEPS
    results = read_record(tmp_path / "best").results
    assert (results["best_step"], results["eval_loss"]) == (best, of_steps[best])
    assert f"the weights of step {best} are kept" in capsys.readouterr().err
    # With a constant rate, a run of so many steps ends with these weights.
    command(kind, *flags, "--max-steps", best, "--output", tmp_path / "short")
    assert_same_weights(tmp_path / "best", tmp_path / "short")
    assert not (tmp_path / "best" / "checkpoints").exists()


def test_an_adapter_that_is_trained_further_is_kept_at_its_best(flags, tmp_path, command):
    lora = ("--lora", "--adapter-only")
    command(Sft, *flags, *lora, "--max-steps", 1, "--output", tmp_path / "start")
    flags = (*flags, *lora, "--model", tmp_path / "start")
    command(Align, *flags, "--keep-best", "--max-steps", STEPS, "--output", tmp_path / "best")
    best = read_record(tmp_path / "best").results["best_step"]
    assert best < STEPS
    command(Align, *flags, "--max-steps", best, "--output", tmp_path / "short")
    assert_same_weights(tmp_path / "best", tmp_path / "short")


def test_without_keep_best_patience_stops_with_the_last_weights(flags, tmp_path, command, capsys):
    command(Sft, *flags, "--patience", 2, "--max-steps", STEPS, "--output", tmp_path / "out")
    losses = [*evaluations(tmp_path / "out").values()]
    assert min(losses) == losses[-3]
    step = EVERY * len(losses)
    assert step < STEPS
    results = read_record(tmp_path / "out").results
    assert (results["stopped_at_step"], results["eval_loss"]) == (step, losses[-1])
    assert f"stopped early after step {step} of {STEPS}" in capsys.readouterr().err
    command(Sft, *flags, "--max-steps", step, "--output", tmp_path / "short")
    assert_same_weights(tmp_path / "out", tmp_path / "short")


@pytest.mark.parametrize("more", [(), ("--eval-steps", EVERY)], ids=["epochs", "steps"])
def test_a_stopped_run_keeps_and_stops_as_one_that_was_not(more, flags, tmp_path, command):
    at = flags.index("--eval-steps")
    flags = (*flags[:at], *flags[at + 2 :], *more, "--batch-size", 2, "--epochs", 8)
    flags = (*flags, "--keep-best", "--patience", 3)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command(Sft, *flags, "--output", whole)
    ended = read_record(whole).results["stopped_at_step"]
    partial = tmp_path / ".stopped.partial"
    # After an evaluation that brought nothing, and in the middle of an epoch.
    before = ended - 4
    log = partial / "training.jsonl"
    stopped_after(before, log, "cwpo_trainer.sft", *flags, "--output", stopped)
    assert last_checkpoint(partial) is not None
    command(Sft, *flags, "--output", stopped, "--resume")
    assert evaluations(stopped) == evaluations(whole)
    for name in ("best_step", "stopped_at_step", "eval_loss"):
        assert read_record(stopped).results[name] == read_record(whole).results[name]
    assert_same_weights(stopped, whole)
