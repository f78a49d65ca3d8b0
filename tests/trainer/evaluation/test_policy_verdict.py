from __future__ import annotations

import pytest

from cwpo_trainer.evaluation.independence import Independence
from cwpo_trainer.evaluation.metrics import Comparison, Estimate, PolicyMetrics, Writing
from cwpo_trainer.evaluation.policy_verdict import verdict

INDEPENDENT = Independence(labelled=[], unknown=[])
PLAIN = Writing(tokens=50, ended=1, distinct=1, distinct_bigrams=0.97)


def policy(win_share, comparison=None, writing=PLAIN):
    return PolicyMetrics(
        preference_accuracy=None,
        implicit_margin=None,
        win_share=win_share,
        win_share_thirds=[win_share] * 3,
        mean_score=0,
        scored=500,
        unscored={},
        writing=writing,
        comparison=comparison,
    )


def against(value, low, high, *, prompts=500, ratio=1.0):
    return Comparison(
        baseline="human",
        win_share=Estimate(value=value, low=low, high=high, prompts=prompts),
        reward_gap=None,
        higher=0.6,
        longer=0.9,
        higher_if_longer=0.63,
        higher_if_not=0.41,
        length_ratio=ratio,
        prompts_needed=1234,
    )


@pytest.mark.parametrize(
    ("comparison", "begins", "says"),
    [
        (against(0.04, 0.01, 0.07), "cw is better than human", "+4.0 points (95 % interval +1.0 "),
        (against(-0.04, -0.07, -0.01), "cw is worse than human", "GRA 64.0% against 60.0%"),
        (against(0.04, -0.01, 0.09), "Whether cw is better than human", "about 1,234 would show"),
        (against(0.4, 0.2, 0.6, prompts=16), "cw against human", "tells nothing"),
    ],
)
def test_the_interval_decides_who_is_better(comparison, begins, says):
    found = verdict({"cw": policy(0.64, comparison), "human": policy(0.6)}, INDEPENDENT)
    assert len(found) == 1
    assert found[0].startswith(begins)
    assert says in found[0]


def test_what_gives_away_a_policy_that_pleases_the_judge_is_said():
    looping = PLAIN.model_copy(update={"ended": 0.5, "distinct_bigrams": 0.4})
    longer = policy(0.64, against(0.04, 0.01, 0.07, ratio=1.8), looping)
    found = verdict({"cw": longer, "human": policy(0.6)}, INDEPENDENT)
    assert len(found) == 4
    assert "1.8 times as long" in found[1]
    assert "they score higher on 41.0%" in found[1]
    assert "50.0% of the answers of cw were cut" in found[2]
    assert "40.0% of the pairs of words" in found[3]


def test_a_judge_with_a_part_in_the_training_is_named():
    judge = Independence(labelled=["cw", "data"], unknown=["reference"])
    labelled, unknown = verdict({"human": policy(0.6)}, judge)
    assert "labelled the training data of cw, data" in labelled
    assert "the reference is not known" in unknown
