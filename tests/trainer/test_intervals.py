from __future__ import annotations

import numpy as np
import pytest

from cwpo_trainer.intervals import bootstrap, count_needed, effective_count, wilson


def test_wilson_by_hand():
    # 5 of 10: the textbook's 0.2366 to 0.7634.
    assert wilson(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def test_values_that_stand_alone_count_in_full():
    values = np.random.default_rng(0).random(50) < 0.3
    assert effective_count(values, np.arange(50)) == 50


def test_copies_of_a_value_count_once():
    values = np.repeat(np.arange(100) % 3 == 0, 7)
    assert effective_count(values, np.repeat(np.arange(100), 7)) == pytest.approx(100, rel=0.02)
    # Whether they are copies cannot be told of values that are all the same.
    assert effective_count(np.ones(700), np.repeat(np.arange(100), 7)) == 100
    assert effective_count(np.ones(3), np.zeros(3)) == 1


def test_groups_without_likeness_count_in_full():
    values = np.random.default_rng(0).random(6000) < 0.3
    groups = np.repeat(np.arange(2000), 3)
    assert effective_count(values, groups) == pytest.approx(6000, rel=0.1)


def test_the_interval_holds_for_pairs_of_conversations():
    draw = np.random.default_rng(5)
    groups = np.repeat(np.arange(80), 5)
    held = narrow = 0
    for _ in range(400):
        # Of a conversation, all are likely to be right, or none: 0.7 in the mean.
        chance = draw.beta(0.7, 0.3, 80)
        values = draw.random(400) < chance[groups]
        low, high = wilson(values.mean(), effective_count(values, groups))
        held += low <= 0.7 <= high
        low, high = wilson(values.mean(), 400)
        narrow += low <= 0.7 <= high
    assert held > 0.92 * 400
    assert narrow < 0.85 * 400


def test_the_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(1).exponential(size=1000)
    half = 1.96 * values.std() / len(values) ** 0.5
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap(values, seed=0) == pytest.approx(expected, abs=0.1 * half)
    assert bootstrap(values, seed=0) == bootstrap(values, seed=0)


def test_the_bootstrap_of_three_values_is_that_of_all_their_resamples():
    # Of the 27 resamples of 0, 1, 5, one is all 0, and one all 5: 3.7 % each.
    assert bootstrap([0, 1, 5], seed=0) == (0, 5)
    assert bootstrap([2, 2, 2], seed=0) == (2, 2)


def test_pairing_shows_a_difference_that_two_intervals_hide():
    draw = np.random.default_rng(2)
    baseline = draw.normal(scale=10, size=400)
    policy = baseline + draw.normal(0.3, 1, size=400)
    assert bootstrap(policy - baseline, seed=0)[0] > 0
    assert bootstrap(policy, seed=0)[0] < bootstrap(baseline, seed=0)[1]


def test_as_many_values_as_are_needed_tell_four_times_of_five():
    draw = np.random.default_rng(3)
    needed = count_needed(draw.normal(0.2, 1, size=100_000))
    assert needed == pytest.approx(196, rel=0.05)
    told = [bootstrap(draw.normal(0.2, 1, size=needed), seed=0)[0] > 0 for _ in range(25)]
    assert 0.55 < np.mean(told) < 0.99
    assert count_needed([1, -1]) is None
    assert count_needed([1, 1]) is None
