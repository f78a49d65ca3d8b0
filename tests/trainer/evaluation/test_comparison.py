from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cwpo.errors import DatasetError
from cwpo_trainer.commands import Align, Evaluate
from cwpo_trainer.evaluation.comparison import compare
from cwpo_trainer.evaluation.judging import Judgement
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, weighted, write_lines


@pytest.mark.slow
def test_an_aligned_policy_prefers_what_people_chose(
    tiny_causal, tiny_annotator, tmp_path, command
):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(32))
    held_out = write_lines(tmp_path / "held_out.jsonl", pairs(12, seed=9))
    command(
        Align,
        *("--model", tiny_causal, "--data", data, "--output", tmp_path / "cw-dpo"),
        *("--batch-size", 4, "--gradient-accumulation", 1, "--learning-rate", 1e-2),
        *("--epochs", 3, "--dtype", "float32"),
    )
    command(
        Evaluate,
        "policy",
        *("--reference", tiny_causal, "--policy", tmp_path / "cw-dpo"),
        *("--annotator", tiny_annotator, "--data", held_out, "--output", tmp_path / "evaluation"),
        *("--prompts", 6, "--max-new-tokens", 8, "--batch-size", 4),
    )
    results = read_record(tmp_path / "evaluation").results
    measured = results["policies"]["cw-dpo"]
    assert measured["preference_accuracy"] > 0.8
    assert measured["implicit_margin"] > 0
    samples = read_lines(tmp_path / "evaluation" / "samples.jsonl")
    assert len(samples) == 6
    scores = [
        [
            -math.inf
            if sample["answers"][name]["score"] is None
            else sample["answers"][name]["score"]
            for name in ("cw-dpo", "reference")
        ]
        for sample in samples
    ]
    assert (results["prompts"], results["prompts_left_out"]) == (6, {})
    wins = [0.5 if ours == theirs else ours > theirs for ours, theirs in scores]
    assert measured["win_share"] == pytest.approx(sum(wins) / len(wins))


def test_a_policy_against_itself_is_a_draw(
    tiny_causal, tiny_annotator, tmp_path, command, tmp_path_factory
):
    held_out = write_lines(tmp_path / "held_out.jsonl", pairs(6, seed=9))
    command(
        Evaluate,
        "policy",
        *("--reference", tiny_causal, "--policy", tiny_causal),
        *("--annotator", tiny_annotator, "--data", held_out, "--output", tmp_path / "evaluation"),
        *("--prompts", 4, "--max-new-tokens", 8, "--batch-size", 3),
    )
    (measured,) = read_record(tmp_path / "evaluation").results["policies"].values()
    assert measured["win_share"] == 0.5
    assert measured["preference_accuracy"] == 0.5
    assert measured["implicit_margin"] == 0


@pytest.fixture
def silent(tiny_causal, tiny_tokenizer, tmp_path):
    """A policy whose likeliest token is always the first of the vocabulary, which is padding."""
    folder = tmp_path / "silent"
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_answers_without_a_score_lose_and_unreadable_prompts_are_left_out(
    tiny_causal, tiny_annotator, silent, tmp_path, command, capsys
):
    rows = pairs(5, seed=9)
    rows[2]["prompt"] = "the day " * 100
    held_out = write_lines(tmp_path / "held_out.jsonl", rows)
    flags = (
        *("--reference", tiny_causal, "--annotator", tiny_annotator, "--data", held_out),
        *("--temperature", 0, "--threads", 1),
    )
    policies = ("--policy", silent, "--policy", tmp_path / "same")
    (tmp_path / "same").symlink_to(tiny_causal)
    output = tmp_path / "short"
    command(Evaluate, "policy", *flags, *policies, "--output", output, "--max-new-tokens", 8)
    printed = capsys.readouterr()
    assert "left out for all: 1 too_long" in printed.err
    assert "loses by answers without a score: 4 empty_response" in printed.out
    results = read_record(output).results
    assert "at most 128 tokens a text" in results["judge"]["reads"]
    assert results["judge"]["reads"] in printed.err
    assert (results["prompts"], results["prompts_left_out"]) == (4, {"too_long": 1})
    assert (results["reference_scored"], results["reference_unscored"]) == (4, {})
    mute = results["policies"]["silent"]
    assert (mute["win_share"], mute["mean_score"], mute["scored"]) == (0, None, 0)
    assert mute["unscored"] == {"empty_response": 4}
    same = results["policies"]["same"]
    assert (same["win_share"], same["scored"], same["unscored"]) == (0.5, 4, {})
    assert same["mean_score"] == results["reference_mean_score"]
    samples = read_lines(output / "samples.jsonl")
    assert {sample["answers"]["silent"]["problem"] for sample in samples} == {"empty_response"}
    assert all(sample["answers"]["same"]["score"] is not None for sample in samples)

    # Answers that are too long against empty ones: neither has a score.
    output = tmp_path / "long"
    command(Evaluate, "policy", *flags, *policies, "--output", output, "--max-new-tokens", 200)
    results = read_record(output).results
    assert results["reference_unscored"] == {"response_too_long": 4}
    assert [item["win_share"] for item in results["policies"].values()] == [0.5, 0.5]


def test_where_the_judge_fails_the_prompt_is_left_out_for_all():
    log_probs = {name: np.zeros((1, 2)) for name in ("reference", "policy")}
    judgements = {
        "reference": Judgement(np.array([1.0, 2.0, math.nan]), {2: "empty_response"}, {}),
        "policy": Judgement(np.array([math.nan, 3.0, 0.0]), {}, {0: "non_finite_score"}),
    }
    metrics, results = compare(log_probs, judgements, {"too_long": 2}, beta=0.5)
    assert results["prompts"] == 2
    assert results["prompts_left_out"] == {"too_long": 2, "non_finite_score": 1}
    assert metrics["policy"].win_share == 1
    assert (metrics["policy"].mean_score, results["reference_mean_score"]) == (1.5, 2)
    nowhere = Judgement(np.full(3, math.nan), {}, dict.fromkeys(range(3), "out_of_memory"))
    with pytest.raises(DatasetError, match="3 out_of_memory"):
        compare(log_probs, judgements | {"policy": nowhere}, {}, beta=0.5)
