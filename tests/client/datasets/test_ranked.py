"""The pairs of a ranking."""

import math

import pytest

from cwpo import RankItem, Triplet
from cwpo.datasets.ranked import RankedPairs, count_pairs, places
from cwpo_annotator import Annotator

ITEM = RankItem(id="row-1", prompt="why", responses=[f"because {n}" for n in range(5)])


@pytest.fixture(params=["best_worst", "adjacent", "all"])
def pairs(request):
    return request.param


@pytest.fixture
def annotator():
    annotator = Annotator.null()
    annotator.temperature = 1.5
    return annotator


def test_which_pairs_there_are_and_in_what_order():
    assert list(places([2, 0, 1, 3], "best_worst")) == [(2, 3)]
    assert list(places([2, 0, 1, 3], "adjacent")) == [(2, 0), (0, 1), (1, 3)]
    assert list(places([2, 0, 1, 3], "all")) == [(2, 0), (2, 1), (2, 3), (0, 1), (0, 3), (1, 3)]


@pytest.mark.parametrize("responses", [2, 3, 64])
def test_they_are_as_many_as_are_counted(pairs, responses):
    found = list(places(range(responses), pairs))
    assert len(found) == len(set(found)) == count_pairs(responses, pairs)


def test_each_pair_has_the_label_of_its_triplet(annotator, pairs):
    (ranking,) = annotator.rank([ITEM])
    found = RankedPairs.of(ranking, pairs, annotator.temperature)
    assert found.id == "row-1"
    for pair in found.pairs:
        assert pair.a < pair.b
        triplet = pair.triplet(ITEM)
        (expected,) = annotator.annotate([triplet])
        # The annotator's tanh is not rounded in the last place of a float32.
        close = {
            name: pytest.approx(getattr(expected, name), rel=3e-7)
            for name in ("confidence", "calibrated_confidence")
        }
        assert pair.label.model_dump() == {**expected.model_dump(), **close}
        chosen, rejected = (pair.a, pair.b) if expected.preferred == "a" else (pair.b, pair.a)
        assert triplet.id == f"row-1#{chosen}-{rejected}"


def test_a_tie_is_a_pair_of_confidence_0_whose_first_response_is_chosen(annotator):
    item = RankItem(id="x", prompt="why", responses=["same", "same"])
    (ranking,) = annotator.rank([item])
    (pair,) = RankedPairs.of(ranking, "all", None).pairs
    assert (pair.a, pair.b, pair.label.id) == (0, 1, "x#0-1")
    assert (pair.label.preferred, pair.label.confidence) == ("tie", 0)
    assert pair.label.calibrated_confidence is None
    assert pair.triplet(item) == Triplet(
        id="x#0-1", prompt="why", response_a="same", response_b="same"
    )


def test_confidence_is_that_of_the_pair_however_far_apart(annotator):
    (ranking,) = annotator.rank([ITEM])
    (pair,) = RankedPairs.of(ranking, "best_worst", annotator.temperature).pairs
    margin = max(ranking.scores) - min(ranking.scores)
    assert pair.label.confidence == pytest.approx(math.tanh(margin / 2))
    assert pair.label.calibrated_confidence == pytest.approx(math.tanh(margin / 3))
