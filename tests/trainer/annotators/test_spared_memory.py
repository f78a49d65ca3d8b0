"""What spares memory in the training of annotators, and changes nothing that is trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cwpo_annotator.encoding.encoder import Encoder
from cwpo_trainer.annotators.base_model import checkpoint_activations, load_with_scalar_head
from cwpo_trainer.annotators.pipeline import encode
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.run.folder import read_lines

from ..samples import pairs, write_lines

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
    scorer = ScalarHeadScorer(model, encoder.pad_token_id, bfloat16=False)
    assert scorer.shares_prompts
    model.train()
    reads = []
    first = model.model.layers[0].mlp
    first.register_forward_hook(lambda *_: reads.append(torch.is_grad_enabled()))
    (scores,) = scorer.scores(batch)
    assert len(reads) == 1
    scores.sum().backward()
    assert len(reads) == 2
