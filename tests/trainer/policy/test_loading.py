"""The reference model in the number format that training computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cwpo_trainer.commands import Align
from cwpo_trainer.policy.loading import load_for_training, load_reference
from cwpo_trainer.run.folder import read_lines

from ..samples import weighted, write_lines


@pytest.fixture
def start(request, tiny_causal, tmp_path):
    """A model whose head is tied to its embedding or is not, stored in a number format."""
    is_tied, stored = request.param
    config = AutoConfig.from_pretrained(tiny_causal)
    config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Norms too have something to round.
        nn.init.normal_(parameter, 0.5, 0.2) if parameter.ndim == 1 else None
    model.to(stored).save_pretrained(tmp_path)
    return tmp_path


BOTH = [(tied, stored) for tied in (False, True) for stored in (torch.float32, torch.bfloat16)]


def computed(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model.eval()(torch.arange(1, 60)[None]).logits


def bytes_of(model):
    return sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("start", BOTH, indirect=True)
def test_the_reference_computes_what_the_policy_does_in_less_memory(start):
    policy = load_for_training(str(start), is_frozen=False, bfloat16=True)
    reference = load_reference(str(start), bfloat16=True, is_sharded=False)
    assert torch.equal(computed(policy), computed(reference))
    linear = sum(m.weight.numel() for m in policy.model.modules() if isinstance(m, nn.Linear))
    head = policy.get_output_embeddings().weight
    if head is not policy.get_input_embeddings().weight:
        linear += head.numel()
    assert bytes_of(reference) == bytes_of(policy) - 2 * linear


@pytest.mark.parametrize("start", BOTH[:1], indirect=True)
def test_sharded_references_are_all_bfloat16_and_others_as_training_computes(start):
    sharded = load_reference(str(start), bfloat16=True, is_sharded=True)
    assert {weight.dtype for weight in sharded.parameters()} == {torch.bfloat16}
    plain = load_reference(str(start), bfloat16=False, is_sharded=False)
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}


@pytest.mark.slow
def test_alignment_in_bfloat16_starts_at_its_reference(tiny_causal, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(8))
    flags = ("--model", tiny_causal, "--data", data, "--dtype", "bfloat16", "--threads", 1)
    command(Align, *flags, "--max-steps", 1, "--beta", 5, "--output", tmp_path / "out")
    (line,) = read_lines(tmp_path / "out" / "training.jsonl")
    assert line["unweighted_loss"] == pytest.approx(0.693147, abs=1e-6)
