"""Texts that differ are told apart, and texts that do not are not."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from transformers import AutoModel

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.evaluation.embeddings import discriminant, embedded, embedding_shift

TRIPLETS = [
    Triplet(prompt="why " * (1 + i % 5), response_a="because good " * i, response_b="no " * (9 - i))
    for i in range(1, 9)
]


def samples(count, apart, width=12, seed=0):
    """Two samples of normal vectors, whose means differ in one direction."""
    draw = np.random.default_rng(seed)
    here, there = draw.normal(size=(2, count, width))
    there[:, 3] += apart
    return here, there


def test_the_auc_is_that_of_two_normal_distributions():
    # P(x' > x) of means 1.5 apart and deviation 1 is Phi(1.5 / sqrt 2).
    found = embedding_shift(*samples(4000, 1.5))
    assert found.auc == pytest.approx(NormalDist().cdf(1.5 / np.sqrt(2)), abs=0.015)
    assert found.auc > found.chance
    assert found.triplets == (4000, 4000)


def test_alike_samples_exceed_chance_as_rarely_as_said():
    above = 0
    for seed in range(400):
        found = embedding_shift(*samples(60, 0, seed=seed))
        above += found.auc > found.chance
    # Of 400 with 5 % each, 36 or more have a probability below 0.0005.
    assert above < 36


def test_more_dimensions_than_samples_tell_nothing_that_is_not_there():
    alike = embedding_shift(*samples(40, 0, width=300))
    assert alike.auc < 0.75
    assert embedding_shift(*samples(40, 8, width=300)).auc > 0.95


def test_the_discriminant_by_hand():
    # Within both, x varies by 1 and y by 4 on average; the middles are (1, 2) apart.
    here = np.array([[-1, -2], [1, 2], [-1, 2], [1, -2]])
    shrunk = (np.diag([1.0, 4.0]) + np.eye(2) * 2.5) / 2
    expected = np.linalg.inv(shrunk) @ [1, 2]
    there = here + np.array([1, 2])
    np.testing.assert_allclose(discriminant(here, there), expected)


def test_the_drawing_has_the_direction_of_most_variance():
    here, there = samples(100, 20)
    found = embedding_shift(here, there)
    ours, theirs = (np.array(points) for points in (found.here, found.there))
    assert abs(ours[:, 0].mean() - theirs[:, 0].mean()) > 1.9
    assert len(ours) == len(theirs) == 100


def test_too_few_tell_nothing():
    assert embedding_shift(*samples(19, 5)) is None
    assert embedding_shift(None, samples(50, 5)[1]) is None


def test_an_embedding_is_the_mean_of_hidden_states(tiny_annotator):
    annotator = Annotator.load(tiny_annotator, dtype="float32")
    found = np.sort(embedded(annotator, TRIPLETS), axis=0)
    model = AutoModel.from_pretrained(tiny_annotator, dtype=torch.float32)
    expected = []
    for pair in annotator.encode(TRIPLETS, "prompt_left"):
        assert isinstance(pair, EncodedPair)
        with torch.no_grad():
            means = [
                model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
                for ids in (pair.a, pair.b)
            ]
        expected.append(torch.stack(means).mean(dim=0).numpy())
    # Triplets are drawn in another order.
    np.testing.assert_allclose(found, np.sort(expected, axis=0), atol=2e-5)


def test_an_annotator_without_hidden_states_has_no_embeddings():
    assert embedded(Annotator.null(), TRIPLETS) is None
