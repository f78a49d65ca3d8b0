from __future__ import annotations

import pytest

from cwpo_trainer.commands import Align, Evaluate
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
        [sample["answers"][name]["score"] for name in ("cw-dpo", "reference")] for sample in samples
    ]
    judged = [both for both in scores if None not in both]
    assert (results["prompts"], results["prompts_not_judged"]) == (len(judged), 6 - len(judged))
    wins = [0.5 if ours == theirs else ours > theirs for ours, theirs in judged]
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
