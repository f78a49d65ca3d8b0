from __future__ import annotations

import numpy as np
import pytest

from cwpo_trainer.commands import Evaluate
from cwpo_trainer.data.labelled import LabelledPair
from cwpo_trainer.evaluation.agreement import JudgedPairs, measured
from cwpo_trainer.evaluation.bias import accuracy_by_source, length_bias, position_bias
from cwpo_trainer.evaluation.shift import kolmogorov_smirnov
from cwpo_trainer.intervals import wilson
from cwpo_trainer.run.folder import read_record

from ..samples import pairs, write_lines


def test_the_figures_cover_every_pair(tiny_annotator, tmp_path, command, capsys):
    held_out = write_lines(tmp_path / "held_out.jsonl", pairs(40))
    flags = (tiny_annotator, "--data", held_out, "--output", tmp_path / "accuracy")
    command(Evaluate, "annotator", *flags)
    assert "on 40 pairs" in capsys.readouterr().out
    results = read_record(tmp_path / "accuracy").results
    assert sum(item["pairs"] for item in results["bins"]) == 40


def test_pairs_that_do_not_fit_are_summed_up(tiny_annotator, tmp_path, command, capsys):
    rows = pairs(5)
    rows[3]["response_a"] = "the day " * 1000
    held_out = write_lines(tmp_path / "held_out.jsonl", rows)
    flags = (tiny_annotator, "--data", held_out, "--output", tmp_path / "accuracy")
    command(Evaluate, "annotator", *flags)
    assert "1 of 5 pairs left out: 1 response_too_long. The model reads at most" in (
        capsys.readouterr().err
    )
    results = read_record(tmp_path / "accuracy").results
    assert (results["pairs"], results["failed"]) == (4, 1)


def judged(margins, temperature=None, prompts=None, **columns):
    """Pairs with these margins; `columns` are further fields of the pairs."""
    prompts = prompts or [f"prompt {at}" for at in range(len(margins))]
    made = [
        LabelledPair(str(at), prompt, "good", "bad", **{k: v[at] for k, v in columns.items()})
        for at, prompt in enumerate(prompts)
    ]
    return JudgedPairs(made, np.array(margins, np.float32), temperature, failed=0)


def test_the_figures_by_hand():
    metrics = measured(judged([2.0, -1.0, 0.0, 4.0], temperature=2.0))
    sure = 1 / (1 + np.exp(-np.array([2.0, 1.0, 0.0, 4.0])))
    right = np.array([1, 0, 0.5, 1])
    assert metrics.accuracy == 2.5 / 4
    assert (metrics.low, metrics.high) == pytest.approx(wilson(2.5 / 4, 4))
    assert metrics.brier == pytest.approx(np.square(sure - right).mean(), abs=1e-6)
    calibrated = 1 / (1 + np.exp(-np.array([2.0, 1.0, 0.0, 4.0]) / 2))
    assert metrics.calibrated_brier == pytest.approx(np.square(calibrated - right).mean(), abs=1e-6)
    assert metrics.ece == pytest.approx(np.abs(sure - right).mean(), abs=1e-6)
    assert metrics.calibrated_ece == pytest.approx(np.abs(calibrated - right).mean(), abs=1e-6)
    assert [item.accuracy for item in metrics.bins] == [0.5, 0, 1, 1]
    assert [point.accuracy.value for point in metrics.coverage] == pytest.approx(
        [1, 1, 2 / 3, 5 / 8]
    )
    assert [point.coverage for point in metrics.coverage] == [0.25, 0.5, 0.75, 1]


def test_coverage_orders_by_confidence_against_brute_force():
    draw = np.random.default_rng(0)
    margins = draw.normal(0.5, 1, 200)
    metrics = measured(judged(margins))
    order = np.argsort(-np.abs(margins))
    for point in metrics.coverage:
        most = order[: round(200 * point.coverage)]
        assert point.accuracy.value == pytest.approx((margins[most] > 0).mean())
        assert point.threshold == pytest.approx(np.tanh(np.abs(margins[most]).min() / 2), rel=1e-5)


def test_pairs_of_one_conversation_make_intervals_wider():
    margins = np.repeat(np.where(np.arange(40) % 3 == 0, -1.0, 1.0), 5)
    apart = measured(judged(margins))
    together = measured(judged(margins, prompts=[f"prompt {at // 5}" for at in range(200)]))
    assert together.accuracy == apart.accuracy
    assert (together.conversations, apart.conversations) == (40, 200)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_length_bias_by_hand():
    pairs = [
        LabelledPair("0", "p0", "longer one", "short"),  # right
        LabelledPair("1", "p1", "longer one", "short"),  # wrong
        LabelledPair("2", "p2", "short", "longer one"),  # wrong
        LabelledPair("3", "p3", "short", "longer one"),  # wrong
        LabelledPair("4", "p4", "short", "shirt"),
    ]
    bias = length_bias(JudgedPairs(pairs, np.array([1, -1, -1, -1, 1], np.float32), None, failed=0))
    assert (bias.annotator.value, bias.people.value, bias.people.pairs) == (0.75, 0.5, 4)
    assert (bias.accuracy_for.value, bias.accuracy_against.value) == (0.5, 0)
    same = [LabelledPair("0", "p", "one", "two")]
    assert length_bias(JudgedPairs(same, np.ones(1, np.float32), None, failed=0)) is None


def test_position_and_source_by_hand():
    made = judged(
        [1, 1, -1, 1],
        chosen_first=[True, True, True, None],
        source=["shp", "shp", "hh", None],
    )
    bias = position_bias(made)
    assert (bias.annotator.value, bias.people.value) == (pytest.approx(2 / 3), 1)
    assert bias.accuracy_against is None
    sources = accuracy_by_source(made)
    assert [*sources] == ["hh", "shp"]
    assert (sources["hh"].value, sources["shp"].value, sources["shp"].pairs) == (0, 1, 2)
    assert position_bias(judged([1, 1])) is None


def test_kolmogorov_smirnov_by_hand_and_by_brute_force():
    one, two = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.25, 0.35, 0.5, 0.6])
    assert kolmogorov_smirnov(one, two) == 0.5
    assert kolmogorov_smirnov(one, one[::-1]) == 0
    draw = np.random.default_rng(0)
    left, right = draw.random(70), draw.beta(2, 1, 50)
    grid = np.linspace(0, 1, 100_001)
    below = [(sample[:, None] <= grid).mean(axis=0) for sample in (left, right)]
    assert kolmogorov_smirnov(left, right) == pytest.approx(np.abs(below[0] - below[1]).max())
