from __future__ import annotations

import numpy as np
import pytest

from cwpo_trainer.intervals import effective_count, wilson


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
