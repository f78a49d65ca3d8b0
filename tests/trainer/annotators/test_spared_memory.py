"""What spares memory in the training of annotators, and changes nothing that is trained."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file

from cwpo_annotator.encoding.encoder import Encoder
from cwpo_trainer.annotators.base_model import checkpoint_activations, load_with_scalar_head
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.pipeline import encode
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, write_lines
from .little_memory import is_training, is_validating, memory_for

FLAGS = ("--batch-size", 8, "--max-length", 64, "--max-steps", 3, "--learning-rate", 3e-3)
FLAGS += ("--warmup-steps", 0, "--validate-every", 2, "--dtype", "float32", "--threads", 1)
FLAGS += ("--held-out-fraction", 0)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(60))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("tiny_causal", ()),
        ("tiny_causal", ("--lora", "--lora-dropout", 0.3)),
        ("tiny_causal", ("--objective", "sft+dpo")),
        ("tiny_bert", ()),
    ],
)
def test_activations_that_are_computed_again_are_the_same(
    model, more, labelled, tmp_path, command, request
):
    flags = ("--model", request.getfixturevalue(model), "--data", labelled, *FLAGS, *more)
    command(TrainAnnotator, *flags, "--output", tmp_path / "kept")
    again = (*flags, "--gradient-checkpointing")
    command(TrainAnnotator, *again, "--output", tmp_path / "again")
    for log in ("training.jsonl", "sft.jsonl"):
        kept, computed = (read_lines(tmp_path / name / log) for name in ("kept", "again"))
        assert kept == computed
    kept, computed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("kept", "again")
    )
    assert kept.keys() == computed.keys()
    for name, weight in kept.items():
        assert torch.equal(weight, computed[name]), name


def test_packed_rows_are_read_again_in_the_backward_pass(tiny_causal, labelled):
    encoder = Encoder.create(tiny_causal, max_length=64)
    batch = encode(encoder, read_pairs(str(labelled))[:4]).pairs
    model = load_with_scalar_head(tiny_causal, encoder)
    checkpoint_activations(model)
    scorer = ScalarHeadScorer(model, encoder.pad_token_id, PassBudget(None, "cpu"), bfloat16=False)
    assert scorer.shares_prompts
    model.train()
    reads = []
    first = model.model.layers[0].mlp
    first.register_forward_pre_hook(lambda *_: reads.append(torch.is_grad_enabled()))
    (read,) = scorer.passes(batch)
    scores = read()
    assert len(reads) == 1
    scores.sum().backward()
    assert len(reads) == 2


def assert_alike(folder, other):
    """Two runs logged the same steps, and gave the same weights, up to rounding."""
    lines, others = (read_lines(path / "training.jsonl") for path in (folder, other))
    assert len(lines) == len(others) == 3
    for line, expected in zip(lines, others, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, other))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("when", [is_training, is_validating])
@pytest.mark.parametrize("objective", ["bt", "dpo"])
def test_what_does_not_fit_is_read_in_smaller_passes(
    objective, when, tiny_causal, labelled, tmp_path, command, caplog
):
    flags = ("--model", tiny_causal, "--data", labelled, *FLAGS, "--objective", objective)
    flags += ("--token-budget", 512, "--validation-fraction", 0.3)
    command(TrainAnnotator, *flags, "--output", tmp_path / "expected")
    with memory_for(100, when=when), caplog.at_level(logging.WARNING, "cwpo_annotator"):
        command(TrainAnnotator, *flags, "--output", tmp_path / "out")
    said = [record.getMessage() for record in caplog.records]
    start = "out of memory: forward passes now have"
    assert said == [f"{start} {n} tokens instead of {2 * n}" for n in (256, 128, 64)]
    assert read_record(tmp_path / "out").results["token_budget"] == 64
    assert read_record(tmp_path / "expected").results["token_budget"] == 512
    assert_alike(tmp_path / "out", tmp_path / "expected")


@pytest.mark.slow
def test_gradients_of_a_step_that_ran_out_of_memory_count_once(
    tiny_causal, labelled, tmp_path, command
):
    flags = ("--model", tiny_causal, "--data", labelled, *FLAGS, "--token-budget", 100)
    command(TrainAnnotator, *flags, "--output", tmp_path / "expected")
    passes = []

    def until_the_second(read):
        passes.append(read)
        return 0 if len(passes) == 2 else read

    with memory_for(until_the_second):
        command(TrainAnnotator, *flags, "--output", tmp_path / "out")
    assert read_record(tmp_path / "out").results["token_budget"] == 50
    assert_alike(tmp_path / "out", tmp_path / "expected")


def test_a_pair_that_does_not_fit_by_itself_is_one_line(tiny_causal, labelled, tmp_path, failure):
    flags = ("--model", tiny_causal, "--data", labelled, *FLAGS, "--output", tmp_path / "out")
    with memory_for(10):
        message = failure(TrainAnnotator, *flags)
    assert "tokens does not fit by itself; try --gradient-checkpointing" in message
