"""`cwpo train-annotator` stopped and resumed, and over several processes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.run.folder import last_checkpoint, read_lines, read_record

from ..launching import (
    assert_annotators_alike,
    assert_same_weights,
    in_two_processes,
    launched,
    said,
)
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
    # Whoever may read the record may read the weights: the service may run as another user.
    (mode,) = {path.stat().st_mode for path in whole.iterdir() if path.is_file()}
    assert mode & 0o044
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


MODULE = ("-m", "cwpo_trainer.train_annotator")
SHARED = ("--sharding", "fsdp2")
PLAIN_LORA = ("--lora", "--lora-dropout", 0)
# By name: flags, and the tokens that the second process has memory for.
RUNS = {
    # The processes' shares differ in size.
    "bt": (("--batch-size", 7), None),
    "little memory": (("--batch-size", 7, "--token-budget", 400), 60),
    "sft+dpo, lora": ((*PLAIN_LORA, "--objective", "sft+dpo"), None),
    "shared": ((*SHARED, "--batch-size", 7, "--token-budget", 60), None),
    # One of the processes has no pair of its own.
    "shared, single pairs": ((*SHARED, "--batch-size", 1), None),
    "shared, lora": ((*SHARED, *PLAIN_LORA, "--gradient-checkpointing"), None),
    "shared, sft+dpo": ((*SHARED, "--objective", "sft+dpo"), None),
    "shared, sft+dpo, lora": ((*SHARED, *PLAIN_LORA, "--objective", "sft+dpo"), None),
}
TOO_LITTLE = "shared, little memory"


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """The folder with the outputs of RUNS in two processes, and of one that has to fail."""
    root = tmp_path_factory.mktemp("two")
    runs = RUNS | {TOO_LITTLE: ((*SHARED, "--token-budget", 400), 60)}
    given = {
        name: ("train-annotator", (*flags, *more), tokens) for name, (more, tokens) in runs.items()
    }
    in_two_processes(root, given)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_follow_one(name, flags, two, tmp_path, command):
    assert all(text.endswith("exit code 0\n") for text in said(two, name)), said(two, name)
    more = tuple(flag for flag in RUNS[name][0] if flag not in SHARED)
    command(TrainAnnotator, *flags, *more, "--output", tmp_path / "one")
    assert_annotators_alike(tmp_path / "one", two / name)


def test_one_of_two_processes_may_run_out_of_memory(two):
    first, second = said(two, "little memory")
    assert "out of memory" not in first
    assert second.count("forward passes now have 200 tokens instead of 400") == 1
    assert read_record(two / "little memory").results["token_budget"] == 50


def test_processes_that_share_a_model_say_what_would_fit(two):
    _, second = said(two, TOO_LITTLE)
    assert "start again (or --resume) with --token-budget 200" in second
    assert second.endswith("exit code 1\n")


def test_two_launched_processes_follow_one(flags, tmp_path, command):
    flags = (*flags, "--objective", "sft+dpo", "--batch-size", 7)
    for name in ("one", "two"):
        more = ("--output", tmp_path / name, "--splits", tmp_path / f"{name}-splits")
        if name == "one":
            command(TrainAnnotator, *flags, *more)
        else:
            done = launched(MODULE, *flags, *more, "--world-size", 2)
            assert done.returncode == 0, done.stderr
    assert_annotators_alike(tmp_path / "one", tmp_path / "two")


def test_a_shared_model_that_was_stopped_ends_as_one_that_was_not(flags, two, tmp_path):
    stopped, whole = tmp_path / "stopped", two / "shared, sft+dpo"
    arguments = (*flags, *RUNS["shared, sft+dpo"][0], "--output", stopped)
    module, log = "cwpo_trainer.train_annotator", partial(stopped) / "training.jsonl"
    message = stopped_after(7, log, module, *arguments, processes=2)
    assert "continue with --resume" in message
    state = torch.load(last_checkpoint(partial(stopped)) / "state.pt", weights_only=True)
    weights = load_file(whole / "model.safetensors")
    for kept in (state["weights"], state["validation"]["weights"]):
        assert {name: kept[name].shape for name in weights} == {
            name: weight.shape for name, weight in weights.items()
        }
    done = launched(MODULE, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("training.jsonl", "sft.jsonl"):
        assert losses(stopped, name) == losses(whole, name)
    assert_same_weights(stopped, whole)
    results = [read_record(path).results for path in (stopped, whole)]
    assert results[0] == results[1]
    assert results[0]["best_step"] is not None


def test_one_process_shares_no_model(flags, tmp_path, failure):
    message = failure(TrainAnnotator, *flags, "--output", tmp_path, "--sharding", "fsdp2")
    assert "torchrun --nproc-per-node ... -m cwpo_trainer.train_annotator" in message


def test_a_missing_process_is_noticed(flags, tmp_path, failure):
    message = failure(TrainAnnotator, *flags, "--output", tmp_path / "out", "--world-size", 2)
    assert "1 processes train, --world-size says 2" in message
