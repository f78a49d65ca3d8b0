"""QLoRA: training with the frozen weights in 4 bits, where bitsandbytes is there to do it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.run.folder import read_lines

from ..samples import weighted, write_lines

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes")
STEPS = 3


@pytest.fixture
def flags(small_causal, tmp_path):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(16))
    return (
        *("--model", small_causal, "--data", data, "--batch-size", 4, "--dtype", "float32"),
        *("--gradient-accumulation", 1, "--max-steps", STEPS, "--learning-rate", 1e-3, "--lora"),
        *("--threads", 1),
    )


def merged(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Align, ("--precompute-reference", "--gradient-checkpointing")),
        (Align, ("--eval-fraction", 0.3, "--eval-steps", 1)),
        (Sft, ("--eval-fraction", 0.3, "--eval-steps", 1)),
    ],
)
def test_four_bits_follow_all_of_them(kind, more, flags, small_causal, tmp_path, command):
    for name, quantised in (("whole", ()), ("four", ("--load-in-4bit",))):
        command(kind, *flags, *more, *quantised, "--output", tmp_path / name)
    whole, four = (
        [line for line in read_lines(tmp_path / name / "training.jsonl") if "loss" in line]
        for name in ("whole", "four")
    )
    assert len(whole) == len(four) == STEPS
    for left, right in zip(whole, four, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=0.05)
        assert right["loss"] != left["loss"] or left["step"] == 1
        if kind is Align:
            assert right["weight"] == left["weight"]
            assert right["logps/chosen"] == pytest.approx(left["logps/chosen"], rel=0.02)
            assert right["logps/chosen"] != left["logps/chosen"]
    # What is merged is the adapter, into the weights as they were before they were rounded.
    start, left, right = map(merged, (small_causal, tmp_path / "whole", tmp_path / "four"))
    assert right.keys() == start.keys()
    moved = 0
    for name, weight in start.items():
        assert right[name].dtype == weight.dtype
        moved += not torch.equal(right[name], weight)
        torch.testing.assert_close(right[name], left[name], rtol=0, atol=5e-3)
    assert moved == 2 * 7


def test_the_adapter_is_trained_in_float32(flags, tmp_path, command):
    command(Align, *flags, "--load-in-4bit", "--output", tmp_path / "out")
    norms = [line["grad_norm"] for line in read_lines(tmp_path / "out" / "training.jsonl")]
    assert any(torch.tensor(norm).bfloat16().item() != norm for norm in norms)


def test_an_adapter_is_trained_further_on_four_bits(flags, tmp_path, command):
    sft = tmp_path / "sft"
    command(Sft, *flags, "--load-in-4bit", "--adapter-only", "--output", sft)
    again = (*flags, "--model", sft, "--load-in-4bit")
    command(Align, *again, "--output", tmp_path / "out")
    log = read_lines(tmp_path / "out" / "training.jsonl")
    # Policy and reference start from the same adapter.
    assert log[0]["unweighted_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log[-1]["rewards/margins"] > 0
