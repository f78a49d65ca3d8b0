"""What FSDP2 makes of a model, in a group of one process; test_train_loop.py has groups of two."""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from cwpo.errors import ConfigError
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_trainer.annotators.base_model import load_with_scalar_head
from cwpo_trainer.annotators.forward import PassBudget, Root
from cwpo_trainer.annotators.pipeline import encode
from cwpo_trainer.annotators.ranks import Ranks
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.annotators.shards import gather, shard
from cwpo_trainer.data.labelled import read_pairs

from ..samples import pairs, write_lines


@pytest.fixture
def ranks(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"), share_model=True)
    distributed.destroy_process_group()


def scored(folder, batch, encoder, ranks=None, *, bfloat16=False):
    """A model after a backward pass, and the scores."""
    torch.manual_seed(0)
    model = load_with_scalar_head(folder, encoder)
    budget = PassBudget(None, "cpu")
    scorer = ScalarHeadScorer(model, encoder.pad_token_id, budget, bfloat16=bfloat16)
    if ranks is not None:
        shard(scorer.root, ranks, bfloat16=bfloat16)
    (read,) = scorer.passes(batch)
    scores = read()
    scores.square().sum().backward()
    return scorer, scores.detach()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("model", ["tiny_causal", "tiny_bert"])
def test_every_weight_is_in_parts_but_while_its_layer_computes(
    model, bfloat16, ranks, tmp_path, request
):
    folder = request.getfixturevalue(model)
    encoder = Encoder.create(folder, max_length=64)
    batch = encode(encoder, read_pairs(str(write_lines(tmp_path / "pairs.jsonl", pairs(4))))).pairs
    plain, expected = scored(folder, batch, encoder)
    scorer, scores = scored(folder, batch, encoder, ranks, bfloat16=bfloat16)
    tolerance = {"rtol": 0.1, "atol": 0.02} if bfloat16 else {}
    torch.testing.assert_close(scores, expected, **tolerance)
    assert scores.dtype == torch.float32
    for name, weight in scorer.model.named_parameters():
        assert isinstance(weight, DTensor), name
        assert weight.dtype == weight.grad.dtype == torch.float32
    with torch.no_grad():
        for read in scorer.passes(batch):
            read()
    gather(scorer.root)
    gathered, whole = (dict(each.model.named_parameters()) for each in (scorer, plain))
    assert gathered.keys() == whole.keys()
    for name, weight in gathered.items():
        assert not isinstance(weight, DTensor)
        assert torch.equal(weight, whole[name]), name


def test_a_model_whose_layers_are_not_known_is_refused(ranks):
    with pytest.raises(ConfigError, match="leave the flag out"):
        shard(Root(torch.nn.Linear(2, 2)), ranks, bfloat16=False)
