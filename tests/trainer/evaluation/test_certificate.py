"""The certificate, against exact arithmetic, and against a truth that is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from cwpo_trainer.evaluation.certificate import certify, labels_needed, most_errors, upper_bound

ALPHA, DELTA = 0.1, 0.05
DRAWS, PAIRS = 1000, 600
# Five standard deviations of the number of broken promises, if each draw breaks one with DELTA.
MOST_BROKEN = DRAWS * DELTA + 5 * math.sqrt(DRAWS * DELTA * (1 - DELTA))


def binomial(errors, pairs, share):
    """P(B <= errors), in exact arithmetic."""
    p = Fraction(share)
    terms = (math.comb(pairs, i) * p**i * (1 - p) ** (pairs - i) for i in range(errors + 1))
    return sum(terms, Fraction(0))


@pytest.mark.parametrize("pairs", [1, 28, 29, 100, 317])
@pytest.mark.parametrize(("share", "delta"), [(0.1, 0.05), (0.25, 0.01), (0.03, 0.4)])
def test_a_threshold_passes_with_as_many_errors_as_the_binomial_allows(pairs, share, delta):
    most = most_errors(pairs, share, delta)
    assert most < 0 or binomial(most, pairs, share) <= delta
    assert binomial(most + 1, pairs, share) > delta


def test_without_errors_the_bound_is_that_of_the_rule_of_three():
    assert most_errors(28, ALPHA, DELTA) == -1
    assert most_errors(29, ALPHA, DELTA) == 0
    assert upper_bound(0, 29, DELTA) == pytest.approx(1 - DELTA ** (1 / 29), abs=1e-12)


@pytest.mark.parametrize(("errors", "pairs"), [(3, 40), (11, 200), (0, 5), (39, 40)])
def test_the_bound_is_clopper_and_pearsons(errors, pairs):
    bound = upper_bound(errors, pairs, DELTA)
    assert float(binomial(errors, pairs, bound)) == pytest.approx(DELTA, abs=1e-9)
    assert upper_bound(pairs, pairs, DELTA) == 1


def test_a_hundred_thousand_labels_are_no_trouble():
    # By the normal approximation, 10,000 errors are 156 fewer for a bound of 10 %.
    assert most_errors(100_000, ALPHA, DELTA) == pytest.approx(10_000 - 156, abs=3)


def test_the_threshold_is_the_lowest_that_passes():
    confidences = np.linspace(1, 0.001, 1000)
    correct = np.ones(1000, bool)
    # The most confident half is right throughout, of the other half every second one.
    correct[500::2] = False
    found = certify(confidences, correct, max_error=ALPHA, delta=DELTA)
    above = confidences > found.threshold
    assert (found.pairs, found.errors) == (above.sum(), (~correct[above]).sum())
    assert found.coverage == above.mean()
    assert found.errors <= most_errors(found.pairs, ALPHA, DELTA)
    # The next one has a tenth more pairs.
    more = math.ceil(1.1 * found.pairs)
    assert (~correct[:more]).sum() > most_errors(more, ALPHA, DELTA)


def test_all_labels_but_ties_may_be_certified():
    confidences = np.r_[np.linspace(1, 0.1, 300), np.zeros(5)]
    correct = np.r_[np.ones(300, bool), np.zeros(5, bool)]
    found = certify(confidences, correct, max_error=ALPHA, delta=DELTA)
    assert (found.threshold, found.pairs, found.errors) == (0, 300, 0)


def test_one_failure_ends_the_test():
    confidences = np.linspace(1, 0.001, 1000)
    correct = np.ones(1000, bool)
    # The surest fifth is a mess. All pairs together would pass.
    correct[:60] = False
    assert most_errors(1000, ALPHA, DELTA) >= 60
    assert certify(confidences, correct, max_error=ALPHA, delta=DELTA) is None


def test_equal_confidences_stay_together():
    confidences = np.r_[np.full(400, 1.0), np.full(200, 0.5), np.full(200, 0.1)]
    correct = np.ones(800, bool)
    correct[600:] = False
    found = certify(confidences, correct, max_error=ALPHA, delta=DELTA)
    assert found.threshold in (0.5, 0.1)
    assert found.pairs == (confidences > found.threshold).sum()
    shuffled = np.random.default_rng(0).permutation(800)
    again = certify(confidences[shuffled], correct[shuffled], max_error=ALPHA, delta=DELTA)
    assert again == found


def test_the_order_of_the_pairs_does_not_matter():
    draw = np.random.default_rng(1)
    confidences = draw.random(500).astype(np.float32)
    correct = draw.random(500) < 0.5 + confidences / 2
    found = certify(confidences, correct, max_error=0.2, delta=DELTA)
    order = draw.permutation(500)
    assert found == certify(confidences[order], correct[order], max_error=0.2, delta=DELTA)


def test_too_few_labels_are_told_how_many_would_do():
    few = np.linspace(1, 0.1, 20), np.ones(20, bool)
    assert certify(*few, max_error=ALPHA, delta=DELTA) is None
    assert labels_needed(*few, max_error=ALPHA, delta=DELTA) == 29
    wrong = np.arange(60) % 20 == 19
    needed = labels_needed(np.linspace(1, 0.1, 60), ~wrong, max_error=ALPHA, delta=DELTA)
    assert 60 < needed < 200
    coin = np.arange(60) % 2 == 0
    assert labels_needed(np.linspace(1, 0.1, 60), coin, max_error=ALPHA, delta=DELTA) is None
    assert labels_needed([], [], max_error=ALPHA, delta=DELTA) is None


def constant(_):
    return ALPHA


def falling(c):
    return 0.3 * (1 - c)


def step(c):
    return np.where(c > 0.7, 0.04, 0.5)


def spike(c):
    """Errors at the top, then few, then many, then few: r crosses max_error three times."""
    return np.select([c > 0.97, c > 0.8, c > 0.7], [0.3, 0.02, 0.32], 0.05)


GRID = np.linspace(0, 1, 20_001)


def truth(error):
    """r(t) of confidences spread evenly, at GRID, by the trapezoid rule from the top down."""
    values = np.broadcast_to(error(GRID), GRID.shape)
    areas = (values[1:] + values[:-1]) / 2 * np.diff(GRID)
    return np.r_[np.cumsum(areas[::-1])[::-1] / (1 - GRID[:-1]), values[-1]]


def broken(error, found):
    """How many of DRAWS sets of labels break the promise, under a truth `error` of c."""
    draw = np.random.default_rng(7)
    shares = truth(error)
    count = 0
    for _ in range(DRAWS):
        confidences = draw.random(PAIRS)
        correct = draw.random(PAIRS) >= error(confidences)
        threshold = found(confidences, correct)
        # At max_error itself the promise is only just kept: the hardest case counts as broken.
        if threshold is not None:
            count += np.interp(threshold, GRID, shares) >= ALPHA - 1e-9
    return count


def honest(confidences, correct):
    found = certify(confidences, correct, max_error=ALPHA, delta=DELTA)
    return None if found is None else found.threshold


def by_estimate(confidences, correct):
    """Spoiled: the lowest threshold above which the observed share of errors is small enough."""
    order = np.argsort(-confidences)
    errors = np.cumsum(~correct[order])
    good = np.flatnonzero(errors[29:] <= ALPHA * np.arange(30, PAIRS + 1))
    return confidences[order][good[-1] + 29] if good.size else None


def without_stopping(confidences, correct):
    """Spoiled: the lowest threshold that passes, whichever ones above it have failed."""
    order = np.argsort(-confidences)
    errors = np.cumsum(~correct[order])
    passed = [k for k in range(30, PAIRS, 5) if errors[k - 1] <= most_errors(k, ALPHA, DELTA)]
    return confidences[order][passed[-1]] if passed else None


@pytest.mark.parametrize("error", [constant, falling, step, spike])
def test_promises_are_kept(error):
    assert broken(error, honest) <= MOST_BROKEN


def test_the_hardest_case_comes_near_to_delta():
    # So the test above is not passed by certifying nothing.
    assert broken(constant, honest) > DRAWS * DELTA / 4


@pytest.mark.parametrize("spoiled", [by_estimate, without_stopping])
def test_spoiled_tests_break_promises(spoiled):
    assert broken(constant, spoiled) > MOST_BROKEN


def test_an_annotator_that_deserves_it_gets_a_certificate():
    draw = np.random.default_rng(3)
    found = []
    for _ in range(50):
        confidences = draw.random(PAIRS)
        correct = draw.random(PAIRS) >= step(confidences)
        found.append(honest(confidences, correct))
    got = [threshold for threshold in found if threshold is not None]
    assert len(got) > 25
    # Down to 0.66, the share of errors is below a tenth.
    assert 0.6 < np.median(got) < 0.8
