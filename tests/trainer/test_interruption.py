from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.run.folder import last_checkpoint, read_lines

from .samples import weighted, write_lines
from .stopping import stopped_after

pytestmark = pytest.mark.slow

STEPS = 20


@pytest.fixture
def flags(tiny_causal, tmp_path):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(24))
    return (
        *("--model", tiny_causal, "--data", data, "--dtype", "float32", "--learning-rate", 1e-2),
        *("--batch-size", 2, "--gradient-accumulation", 2, "--max-steps", STEPS, "--threads", 1),
    )


def partial(output):
    return output.with_name(f".{output.name}.partial")


def interrupted(module, output, *arguments):
    """A run that SIGTERM stopped, with the step that it got to."""
    log = partial(output) / "training.jsonl"
    message = stopped_after(2, log, module, *arguments, "--output", output)
    checkpoint = last_checkpoint(partial(output))
    assert f"after {checkpoint.name.replace('checkpoint-', 'step ')}" in message
    assert not output.exists()
    return int(checkpoint.name.rpartition("-")[2])


def assert_same_weights(left, right):
    left, right = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (left, right)
    )
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def losses(output):
    return [(line["step"], line["loss"]) for line in read_lines(output / "training.jsonl")]


@pytest.mark.parametrize(("kind", "more"), [(Align, ()), (Sft, ("--lora", "--lora-dropout", 0.2))])
def test_a_stopped_run_ends_as_one_that_was_not(kind, more, flags, tmp_path, command, failure):
    module = f"cwpo_trainer.{kind.__name__.lower()}"
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert 2 <= interrupted(module, stopped, *flags, *more) < STEPS
    again = (kind, *flags, *more, "--output", stopped)
    assert "continue with --resume" in failure(*again)
    assert "weight_decay was 0.05" in failure(*again, "--resume", "--weight-decay", 0.1)
    command(*again, "--resume")
    command(kind, *flags, *more, "--output", whole)
    assert losses(stopped) == losses(whole)
    assert [step for step, _ in losses(whole)] == [*range(1, STEPS + 1)]
    assert_same_weights(stopped, whole)
    folders = [path.name for path in stopped.iterdir() if path.is_dir()]
    assert folders == (["adapter"] if "--lora" in more else [])
    assert not partial(stopped).exists()


def test_a_run_that_failed_keeps_its_checkpoints(flags, tmp_path, failure):
    output = tmp_path / "out"
    data = tmp_path / "weighted.jsonl"
    message = failure(Align, *flags, "--learning-rate", 1e30, "--output", output, "--save-steps", 1)
    assert "the loss became" in message
    assert last_checkpoint(partial(output)) is not None
    write_lines(data, weighted(20))
    message = failure(Align, *flags, "--learning-rate", 1e30, "--output", output, "--resume")
    assert "sha256 of data" in message
    assert last_checkpoint(partial(output)) is not None


def test_resume_without_a_checkpoint_starts(flags, tmp_path, command):
    command(Align, *flags, "--output", tmp_path / "out", "--resume", "--max-steps", 1)
    assert len(losses(tmp_path / "out")) == 1
