"""A device that runs out of memory: the model raises torch's own error above so many tokens."""

import logging

import numpy as np
import pytest
import torch

from cwpo import Triplet
from cwpo.types import ScoreItem
from cwpo_annotator import Annotator

TRIPLETS = [
    Triplet(prompt="why cat " * words, response_a="because good", response_b="no " * words)
    for words in (1, 3, 2, 5, 1, 4)
]
# Enough for several passes on each core.
MANY = [
    Triplet(prompt="why cat " * words, response_a="because good", response_b="no " * others)
    for words in range(1, 6)
    for others in range(1, 6)
]
GIANT = Triplet(prompt="people " * 40, response_a="good", response_b="bad")


def with_memory_for(annotator, tokens):
    def refuse(module, inputs, options):
        ids = inputs[0] if inputs else options["input_ids"]
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError(f"{ids.numel()} tokens")

    backend = annotator.backend
    for model in getattr(backend, "model", None), getattr(backend, "policy", None):
        if model is not None:
            model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    return annotator


def scores_of(annotations):
    return np.array([(a.score_a, a.score_b) for a in annotations])


@pytest.mark.slow
def test_batches_are_halved_until_they_fit_and_stay_so(folder, caplog):
    expected = Annotator.load(folder, device="cpu").annotate(MANY)
    annotator = with_memory_for(Annotator.load(folder, device="cpu", token_budget=256), 60)
    with caplog.at_level(logging.WARNING, "cwpo_annotator"):
        annotations = annotator.annotate(MANY)
    np.testing.assert_allclose(scores_of(annotations), scores_of(expected), atol=1e-5)
    assert annotator.backend.token_budget <= 64
    messages = [record.getMessage() for record in caplog.records]
    assert "out of memory: forward passes now have 128 tokens instead of 256" in messages
    caplog.clear()
    annotator.annotate(MANY)
    assert not caplog.records


@pytest.mark.slow
def test_what_does_not_fit_even_alone_is_that_items_error(folder):
    annotator = with_memory_for(Annotator.load(folder, device="cpu", token_budget=256), 40)
    expected = Annotator.load(folder, device="cpu").annotate(TRIPLETS)
    *before, failed, last = annotator.annotate([*TRIPLETS[:5], GIANT, TRIPLETS[5]])
    assert failed.error.code == "out_of_memory"
    np.testing.assert_allclose(scores_of([*before, last]), scores_of(expected), atol=1e-5)
    # One giant is no reason to read the others in crumbs.
    assert annotator.backend.token_budget > 20


def test_single_texts_too(folder):
    items = [ScoreItem(prompt=t.prompt, response=t.response_a) for t in [*TRIPLETS, GIANT]]

    def scores(annotator):
        return annotator.score_texts(annotator.encode_texts(items))

    expected = scores(Annotator.load(folder, device="cpu"))
    found = scores(with_memory_for(Annotator.load(folder, device="cpu", token_budget=256), 40))
    np.testing.assert_allclose(found.values[:-1], expected.values[:-1], atol=1e-5)
    assert found.too_large.tolist() == [False] * len(TRIPLETS) + [True]
    assert np.isnan(found.values[-1])
