from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from chat_server import chat_server
from cwpo_annotator import Annotator
from cwpo_trainer.commands import Align, Evaluate
from cwpo_trainer.policy.sampling import LoadedPolicy, Sampling
from cwpo_trainer.run.folder import new_run_folder, read_lines, read_record

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
        *(tmp_path / "cw-dpo", "--reference", tiny_causal),
        *("--judge", tiny_annotator, "--data", held_out, "--output", tmp_path / "evaluation"),
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


def test_a_policy_against_itself_is_a_draw_also_for_programs(
    tiny_causal, tiny_annotator, tmp_path, command, capsys
):
    held_out = write_lines(tmp_path / "held_out.jsonl", pairs(6, seed=9))
    command(
        Evaluate,
        "policy",
        *(tiny_causal, "--reference", tiny_causal),
        *("--judge", tiny_annotator, "--data", held_out, "--output", tmp_path / "evaluation"),
        *("--prompts", 4, "--max-new-tokens", 8, "--batch-size", 3, "--json"),
    )
    results = read_record(tmp_path / "evaluation").results
    page = str(tmp_path / "evaluation" / "report.html")
    assert json.loads(capsys.readouterr().out) == {**results, "page": page}
    (measured,) = results["policies"].values()
    assert measured["win_share"] == 0.5
    assert measured["preference_accuracy"] == 0.5
    assert measured["implicit_margin"] == 0
    assert measured["divergence"] == {"answer": 0, "token": 0}
    against = measured["comparison"]
    assert (against["baseline"], against["higher"], against["longer"]) == ("reference", 0.5, 0)
    assert against["win_share"] == {"value": 0, "low": 0, "high": 0, "prompts": 4}


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
        *("--reference", tiny_causal, "--judge", tiny_annotator, "--data", held_out),
        *("--temperature", 0, "--threads", 1),
    )
    policies = (silent, tmp_path / "same")
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


@pytest.fixture
def sharper(tiny_causal, tiny_tokenizer, tmp_path):
    """A policy that holds more likely what the tiny one holds likely."""
    folder = tmp_path / "sharper"
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def log_prob(model, answer):
    """Of what was generated, by transformers' own logits."""
    prompt, written = answer.tokens.prompt_ids, answer.tokens.response_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) + at - 1, token].item() for at, token in enumerate(written))


@pytest.mark.slow
def test_prompts_alone_will_do_and_the_divergence_is_of_what_was_generated(
    tiny_causal, tiny_annotator, sharper, tmp_path, command, capsys
):
    rows = [{"prompt": row["prompt"]} for row in pairs(5)]
    data = write_lines(tmp_path / "prompts.jsonl", rows)
    output = tmp_path / "evaluation"
    (tmp_path / "same").symlink_to(tiny_causal)
    command(
        Evaluate,
        "policy",
        *(sharper, "--reference", tiny_causal, "--baseline", tmp_path / "same"),
        *("--judge", tiny_annotator, "--data", data, "--output", output, "--seed", 3),
        *("--max-new-tokens", 6, "--temperature", 1, "--token-budget", 60, "--threads", 1),
    )
    results = read_record(output).results
    measured = results["policies"]["sharper"]
    assert (results["pairs"], measured["preference_accuracy"]) == (0, None)
    assert results["policies"]["same"]["comparison"] is None
    assert measured["comparison"]["baseline"] == results["baseline"] == "same"
    sampling = Sampling(max_new_tokens=6, temperature=1, batch_size=32, seed=3, token_budget=60)
    answers = LoadedPolicy(str(sharper), "float32").answers(
        [row["prompt"] for row in rows], sampling, "answers"
    )
    samples = read_lines(output / "samples.jsonl")
    assert [each["answers"]["sharper"]["answer"] for each in samples] == [
        answer.text for answer in answers
    ]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (sharper, tiny_causal))
    ratios = [log_prob(ours, answer) - log_prob(theirs, answer) for answer in answers]
    tokens = sum(len(answer.tokens.response_ids) for answer in answers)
    assert measured["divergence"]["answer"] == pytest.approx(sum(ratios) / 5, rel=1e-4)
    assert measured["divergence"]["token"] == pytest.approx(sum(ratios) / tokens, rel=1e-4)
    assert sum(ratios) > 0
    said = capsys.readouterr().out
    assert "With fewer than 30 prompts that tells nothing" in said
    assert "the training data of sharper, same, the reference is not known" in said
    assert all(sentence in said for sentence in results["verdict"])
    assert (output / "report.html").exists()


@pytest.mark.slow
def test_the_annotator_that_labelled_the_training_data_is_no_judge(
    tiny_causal, tiny_annotator, tmp_path, command, failure
):
    policy = tmp_path / "cw-dpo"
    annotator = Annotator.load(tiny_annotator).model
    with new_run_folder("align", policy, {"labels": "annotator"}) as made:
        for part in tiny_causal.iterdir():
            (made.path / part.name).symlink_to(part)
        made.results["annotator"] = annotator.model_dump()
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "who"}])
    flags = (policy, "--reference", tiny_causal, "--judge", tiny_annotator, "--data", data)
    message = failure(Evaluate, "policy", *flags, "--output", tmp_path / "no")
    assert "labelled the data of cw-dpo" in message
    assert "--allow-annotator-as-judge" in message
    assert not (tmp_path / "no").exists()
    flags = (*flags, "--allow-annotator-as-judge", "--max-new-tokens", 2)
    command(Evaluate, "policy", *flags, "--output", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The judge labelled the training data of cw-dpo" in page


@pytest.mark.slow
def test_an_llm_judges_too_and_a_failed_run_is_continued(
    tiny_causal, tiny_annotator, tmp_path, command, failure, capsys
):
    rows = pairs(3, seed=9)
    data = write_lines(tmp_path / "held_out.jsonl", rows)
    output = tmp_path / "evaluation"
    kept = tmp_path / ".evaluation.llm_judge.jsonl"

    def flags(chat):
        return (
            *("policy", tiny_causal, "--reference", tiny_causal, "--judge", tiny_annotator),
            *("--data", data, "--output", output, "--max-new-tokens", 8, "--threads", 1),
            *("--llm-judge", chat.url, "--llm-judge-model", "gpt", "--llm-judge-requests", 1),
        )

    def failing(question):
        if len(chat.requests) == 3:
            chat.failures = [(400, {}, "no")] * 9
        return "B"

    with chat_server(failing) as chat:
        assert "2 of 6 replies are kept" in failure(Evaluate, *flags(chat))
        assert not output.exists()
        assert len(read_lines(kept)) == 2
    with chat_server(lambda _: "B", usage={"prompt_tokens": 9, "completion_tokens": 1}) as chat:
        command(Evaluate, *flags(chat))
        # Its prompts, with answers and chosen responses.
        chosen = {row["response_a" if row["preferred"] == "a" else "response_b"] for row in rows}
        assert len(chat.questions) == 1 + 4
        for question in chat.questions[1:]:
            assert any(row["prompt"] in question for row in rows)
            assert any(text in question for text in chosen)
    assert not kept.exists()
    assert len(read_lines(output / "llm_judge.jsonl")) == 6
    found = read_record(output).results["llm_judge"]
    assert (found["questions"], found["questions_kept"], found["prompt_tokens"]) == (6, 2, 36)
    assert found["policies"]["causal"]["ties"] == 3
    assert "The LLM judge gpt prefers answers of causal to the chosen" in capsys.readouterr().out


def test_settings_of_an_llm_judge_belong_together(tiny_causal, tmp_path, failure):
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "who"}])
    flags = ("policy", tiny_causal, "--reference", tiny_causal, "--judge", tiny_causal)
    flags = (*flags, "--data", data, "--output", tmp_path / "out")
    message = failure(Evaluate, *flags, "--llm-judge-prompt", "summary")
    assert "needs --llm-judge" in message
    message = failure(Evaluate, *flags, "--llm-judge", "http://x")
    assert "--llm-judge-model" in message
    message = failure(Evaluate, *flags, "--llm-judge", "http://x", "--llm-judge-model", "gpt")
    assert "has no labelled pairs" in message
