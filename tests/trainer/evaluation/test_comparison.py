from __future__ import annotations

import math
from statistics import stdev

import numpy as np
import pytest

from cwpo.errors import DatasetError
from cwpo_trainer.evaluation.comparison import Observed, compare
from cwpo_trainer.evaluation.judging import Judgement

NAN = math.nan


def observed(scores, *, texts=None, lengths=None, unscored=None, failures=None, **more):
    """A model by the scores of its answers."""
    count = len(scores)
    return Observed(
        Judgement(np.array(scores, dtype=float), unscored or {}, failures or {}),
        preferences=np.zeros((1, 2)),
        texts=texts or [f"answer {at}" for at in range(count)],
        lengths=np.array(lengths or [5] * count),
        ended=np.ones(count, dtype=bool),
        **more,
    )


def test_where_the_judge_fails_the_prompt_is_left_out_for_all():
    models = {
        "reference": observed([1.0, 2.0, NAN], unscored={2: "empty_response"}),
        "policy": observed([NAN, 3.0, 0.0], failures={0: "non_finite_score"}),
    }
    metrics, results = compare(models, {"too_long": 2}, beta=0.5)
    assert results["prompts"] == 2
    assert results["prompts_left_out"] == {"too_long": 2, "non_finite_score": 1}
    assert metrics["policy"].win_share == 1
    assert (metrics["policy"].mean_score, results["reference_mean_score"]) == (1.5, 2)
    nowhere = observed([NAN] * 3, failures=dict.fromkeys(range(3), "out_of_memory"))
    with pytest.raises(DatasetError, match="3 out_of_memory"):
        compare(models | {"policy": nowhere}, {}, beta=0.5)


def test_a_policy_is_compared_with_the_baseline_prompt_by_prompt():
    models = {
        "cw-dpo": observed([2, 2, 2, 0, NAN, 5], lengths=[9, 9, 1, 1, 0, 10], unscored={4: "e"}),
        "human": observed([1, 3, 1, 1, 1, 3], lengths=[5] * 6),
        "reference": observed([0, 0, 1, 1, 0, 5]),
    }
    metrics, results = compare(models, {}, beta=0.5, baseline="human")
    # Wins over the reference: 1 1 1 0 0 ½ and 1 1 ½ ½ 1 0.
    assert metrics["cw-dpo"].win_share == pytest.approx(3.5 / 6)
    assert metrics["cw-dpo"].win_share_thirds == [1, 0.5, 0.25]
    assert metrics["cw-dpo"].win_share_deviation == pytest.approx(stdev([1, 0.5, 0.25]))
    assert metrics["human"].win_share == pytest.approx(4 / 6)
    assert metrics["human"].comparison is None
    found = metrics["cw-dpo"].comparison
    assert found.win_share.value == pytest.approx(-0.5 / 6)
    assert found.win_share.low < found.win_share.value < found.win_share.high
    # Of the five prompts on which both have a score.
    assert found.reward_gap.value == pytest.approx((1 - 1 + 1 - 1 + 2) / 5)
    assert found.reward_gap.prompts == 5
    assert found.higher == pytest.approx(3 / 6)
    assert found.longer == pytest.approx(3 / 6)
    assert (found.higher_if_longer, found.higher_if_not) == pytest.approx((2 / 3, 1 / 3))
    assert found.length_ratio == pytest.approx(1)
    assert results["baseline"] == "human"


def test_against_the_reference_a_win_share_is_compared_with_a_half():
    models = {"policy": observed([1, 1, 1, 0]), "reference": observed([0, 0, 0, 1])}
    metrics, _ = compare(models, {}, beta=0.5)
    found = metrics["policy"].comparison
    assert found.win_share.value == pytest.approx(0.25)
    assert found.higher == metrics["policy"].win_share == 0.75
    # Differences ½ ½ ½ -½: mean ¼, variance ¼.
    assert found.prompts_needed == math.ceil(0.25 * ((1.959964 + 0.841621) / 0.25) ** 2)


def test_what_the_judge_does_not_see():
    texts = ["to be or to be", "yes", "yes", ""]
    models = {
        "policy": observed(
            [1, 1, 1, NAN],
            texts=texts,
            lengths=[5, 1, 1, 0],
            log_ratios=(np.array([3.0, 1.0, 0.0, 0.0]), np.array([6, 2, 2, 1])),
        ),
        "reference": observed([0, 0, 0, 0]),
    }
    metrics, _ = compare(models, {}, beta=0.5)
    writing = metrics["policy"].writing
    assert writing.tokens == pytest.approx(7 / 4)
    assert writing.distinct == 3 / 4
    # Of the first: to be, be or, or to, to be; the others have none.
    assert writing.distinct_bigrams == pytest.approx((3 / 4 + 3) / 4)
    divergence = metrics["policy"].divergence
    assert (divergence.answer, divergence.token) == pytest.approx((1, 4 / 11))
