"""`cwpo train-annotator` stopped and resumed, and over several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cwpo_annotator.checkpoint import read_card
from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.run.folder import last_checkpoint, read_lines, read_record

from ..samples import pairs, write_lines
from ..stopping import stopped_after

pytestmark = pytest.mark.slow

STEPS = 12


@pytest.fixture(scope="module")
def flags(tiny_causal, tmp_path_factory):
    data = write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(60))
    return (
        *("--model", tiny_causal, "--data", data, "--max-length", 64, "--learning-rate", 3e-3),
        *("--dtype", "float32", "--batch-size", 6, "--threads", 1, "--validate-every", 3),
        *("--max-steps", STEPS),
    )


def partial(output):
    return output.with_name(f".{output.name}.partial")


def assert_same_weights(left, right, **tolerance):
    left, right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert left.keys() == right.keys()
    for name, value in left.items():
        if tolerance:
            torch.testing.assert_close(value, right[name], **tolerance)
        else:
            assert torch.equal(value, right[name]), name


def losses(output, log="training.jsonl"):
    return [(line["step"], line["loss"]) for line in read_lines(output / log)]


@pytest.mark.parametrize(
    ("more", "log"),
    [
        (("--lora", "--lora-dropout", 0.2), "training.jsonl"),
        (("--objective", "sft+dpo", "--save-steps", 1), "sft.jsonl"),
        (("--objective", "sft+dpo"), "training.jsonl"),
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not(more, log, flags, tmp_path, command, failure):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    module = "cwpo_trainer.train_annotator"
    message = stopped_after(2, partial(stopped) / log, module, *flags, *more, "--output", stopped)
    assert "continue with --resume" in message
    assert not stopped.exists()
    assert last_checkpoint(partial(stopped)) is not None
    again = (*flags, *more, "--output", stopped)
    assert "continue with --resume" in failure(TrainAnnotator, *again)
    other = (*again, "--resume", "--weight-decay", 0.5)
    assert "weight_decay was 0.01" in failure(TrainAnnotator, *other)
    command(TrainAnnotator, *again, "--resume")
    command(TrainAnnotator, *flags, *more, "--output", whole)
    for name in ("training.jsonl", "sft.jsonl"):
        assert losses(stopped, name) == losses(whole, name)
    assert [step for step, _ in losses(whole)] == [*range(1, STEPS + 1)]
    assert_same_weights(stopped, whole)
    results = [read_record(path).results for path in (stopped, whole)]
    assert results[0] == results[1]
    if "sft+dpo" in more:
        assert_same_weights(stopped / "reference", whole / "reference")
    assert not partial(stopped).exists()
    assert not (stopped / "checkpoints").exists()


def run(start, output, flags, *more, batch_size=7):
    """A run of a program, alone or under torchrun."""
    command = (*start, *flags, *more, "--output", output, "--batch-size", batch_size)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, command)], capture_output=True, env=environment, check=False, text=True
    )


def launched(*arguments, **more):
    """What a run that has to succeed printed."""
    done = run(*arguments, **more)
    assert done.returncode == 0, done.stderr
    return done.stderr


MODULE = ("-m", "cwpo_trainer.train_annotator")
ONE = (sys.executable,)
TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2)


# 7 pairs a step: the processes' shares differ in size.
@pytest.mark.parametrize("objective", ["bt", "sft+dpo"])
def test_two_processes_follow_one(objective, flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for start, output, size in ((ONE, one, 1), (TWO, two, 2)):
        more = ("--world-size", size, "--objective", objective)
        more += ("--splits", tmp_path / f"{output.name}-splits")
        launched((*start, *MODULE), output, flags, *more)
    assert_alike(one, two)


def test_one_of_two_processes_may_run_out_of_memory(flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    launched((*ONE, *MODULE), one, flags)
    worker = Path(__file__).with_name("little_memory.py")
    said = launched((*TWO, worker, 1, 60), two, flags, "--token-budget", 400)
    assert said.count("tokens instead of 400") == 1
    assert read_record(two).results["token_budget"] == 50
    assert_alike(one, two)


@pytest.mark.parametrize(
    ("batch_size", "more"),
    [
        (7, ("--token-budget", 60)),
        # One of the processes has no pair of its own.
        (1, ()),
        (7, ("--lora", "--lora-dropout", 0, "--gradient-checkpointing")),
        (7, ("--objective", "sft+dpo")),
        (7, ("--objective", "sft+dpo", "--lora", "--lora-dropout", 0)),
    ],
)
def test_two_processes_that_share_the_model_follow_one(batch_size, more, flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    launched((*ONE, *MODULE), one, flags, *more, batch_size=batch_size)
    shared = (*more, "--sharding", "fsdp2")
    launched((*TWO, *MODULE), two, flags, *shared, batch_size=batch_size)
    assert_alike(one, two)
    if "--objective" in more:
        assert_same_weights(one / "reference", two / "reference", rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("more", [(), ("--objective", "sft+dpo")])
def test_a_shared_model_that_was_stopped_ends_as_one_that_was_not(more, flags, tmp_path, failure):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    flags = (*flags, *more, "--sharding", "fsdp2", "--save-steps", 1)
    module, log = "cwpo_trainer.train_annotator", partial(stopped) / "training.jsonl"
    arguments = (*flags, "--output", stopped, "--batch-size", 7)
    message = stopped_after(7, log, module, *arguments, processes=2)
    assert "continue with --resume" in message
    checkpoint = last_checkpoint(partial(stopped))
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state["weights"]["model.embed_tokens.weight"].shape[1] == 32
    assert all(type(value) is torch.Tensor for value in state["weights"].values())
    launched((*TWO, *MODULE), stopped, flags, "--resume")
    launched((*TWO, *MODULE), whole, flags)
    assert losses(stopped) == losses(whole)
    assert_same_weights(stopped, whole)
    results = [read_record(path).results for path in (stopped, whole)]
    assert results[0] == results[1]
    assert results[0]["best_step"] is not None


def test_processes_that_share_a_model_say_what_would_fit(flags, tmp_path):
    worker = Path(__file__).with_name("little_memory.py")
    shared = ("--sharding", "fsdp2", "--token-budget", 400)
    done = run((*TWO, worker, 1, 60), tmp_path / "out", flags, *shared)
    assert done.returncode != 0
    assert "start again (or --resume) with --token-budget 200" in done.stderr


def test_one_process_shares_no_model(flags, tmp_path, failure):
    message = failure(TrainAnnotator, *flags, "--output", tmp_path, "--sharding", "fsdp2")
    assert "torchrun --nproc-per-node ... -m cwpo_trainer.train_annotator" in message


def assert_alike(one, two):
    """Two runs of the same steps, up to rounding."""
    for left, right in zip(*(read_lines(x / "training.jsonl") for x in (one, two)), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert_same_weights(one, two, rtol=1e-3, atol=2e-4)
    assert read_card(one).temperature == pytest.approx(read_card(two).temperature, rel=1e-2)


def test_a_missing_process_is_noticed(flags, tmp_path, failure):
    message = failure(TrainAnnotator, *flags, "--output", tmp_path / "out", "--world-size", 2)
    assert "1 processes train, --world-size says 2" in message
