from __future__ import annotations

import re

import pytest

from chat_server import chat_server
from cwpo.errors import CwpoError
from cwpo_trainer.evaluation.llm_judge import llm_judge
from cwpo_trainer.settings.evaluation import LlmJudging

TEMPORARY = [
    (429, {"Retry-After": "0"}, "slow down"),
    (500, {"Retry-After": "0"}, ""),
    (503, {"Retry-After": "0"}, "full"),
]


def longer(question):
    """Prefers the longer answer, and the first of two that are as long."""
    a, b = re.search(r"Response A: (.*?)\n\nResponse B: (.*?)\n\nFIRST", question, re.S).groups()
    return f'Comparison: length.\nPrefered: "{"A" if len(a) >= len(b) else "B"}"'


def reply(question):
    return longer(question) if "Response A" in question else "A"


def compare(chat, kept, answers, others, **more):
    settings = LlmJudging(llm_judge=chat.url, llm_judge_model="gpt", llm_judge_requests=3)
    prompts = [f"prompt {at}" for at in range(len(others))]
    with llm_judge(settings, kept) as llm:
        return llm.judgement(
            prompts, answers, others, against="chosen", **({"baseline": "reference"} | more)
        )


def test_a_prompt_is_won_in_both_orders(tmp_path):
    answers = {"cw": ["longest", "x", "same size", "", "twin", ""], "human": ["longest"] * 6}
    others = ["short", "longer", "as  large", "any", "twin", " "]
    with chat_server(reply, usage={"prompt_tokens": 100, "completion_tokens": 7}) as chat:
        found = compare(chat, tmp_path / "kept.jsonl", answers, others, baseline="human")
    cw = found.policies["cw"]
    # A win, a loss, a judge that wants the first, an empty answer, equal ones, two empty ones.
    assert (cw.wins, cw.ties, cw.losses, cw.unclear) == (1, 3, 2, 0)
    assert cw.rate.value == pytest.approx(2.5 / 6)
    # Longer than others but once, and against an empty one, which loses unasked.
    human = found.policies["human"]
    assert (human.wins, human.losses, human.difference) == (5, 1, None)
    assert cw.difference.value == pytest.approx((2.5 - 5) / 6)
    # Of 12 comparisons three are not asked for cw and one for human, and one is the same for both.
    assert (found.questions, found.questions_kept) == (2 * (3 + 5 - 1), 0)
    assert (found.prompt_tokens, found.completion_tokens) == (1400, 98)
    # All of these, and the question whether it replies at all.
    assert len(chat.requests) == 15
    assert {request["model"] for request in chat.requests} == {"gpt"}
    assert {request["temperature"] for request in chat.requests} == {0}


def test_replies_that_name_no_answer_are_ties_and_counted(tmp_path):
    with chat_server(lambda _: "Both are good.") as chat:
        found = compare(chat, tmp_path / "kept.jsonl", {"cw": ["one"]}, ["other"])
    assert (found.policies["cw"].ties, found.policies["cw"].unclear) == (1, 2)
    assert found.prompt_tokens == 0


def test_failures_that_pass_are_waited_for(tmp_path):
    def unsteady(question):
        if len(chat.requests) == 1:
            chat.failures = [*TEMPORARY]
        return reply(question)

    with chat_server(unsteady) as chat:
        found = compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
        assert (found.policies["cw"].wins, found.questions) == (1, 2)
        assert (chat.failures, len(chat.requests)) == ([], 3)


def test_a_reply_is_kept_behind_a_line_that_was_cut(tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"key": "cut')
    with chat_server(reply) as chat:
        compare(chat, kept, {"cw": ["longest"]}, ["short"])
        assert compare(chat, kept, {"cw": ["longest"]}, ["short"]).questions_kept == 2


def test_a_run_that_failed_asks_only_for_what_is_missing(tmp_path):
    kept = tmp_path / "kept.jsonl"
    answers, others = {"cw": [f"answer {'x' * at}" for at in range(9)]}, ["answer xxx!"] * 9

    def failing(question):
        if len(chat.requests) == 6:
            chat.failures = [(400, {}, "context length exceeded")] * 20
        return reply(question)

    with chat_server(failing) as chat:
        with pytest.raises(CwpoError, match=r"400 .*of 18 replies are kept"):
            compare(chat, kept, answers, others)
        done = len(kept.read_text().splitlines())
        assert 0 < done < 18
    # As a process leaves it that is killed while it writes.
    with kept.open("a") as file:
        file.write('{"key": "cut')
    with chat_server(reply) as chat:
        found = compare(chat, kept, answers, others)
        assert len(chat.requests) == 1 + 18 - done
        assert (found.questions, found.questions_kept) == (18, done)
        assert found.policies["cw"].wins == 4
        again = compare(chat, kept, answers, others)
        assert len(chat.requests) == 2 + 18 - done
    assert again.policies == found.policies
    assert again.questions_kept == 18


def test_replies_of_one_model_are_not_those_of_another(tmp_path):
    settings = LlmJudging(llm_judge="http://x", llm_judge_model="gpt")
    with chat_server(reply) as chat:
        compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
        other = settings.model_copy(update={"llm_judge": chat.url, "llm_judge_model": "other"})
        with llm_judge(other, tmp_path / "kept.jsonl") as llm:
            found = llm.judgement(
                ["prompt 0"], {"cw": ["longest"]}, ["short"], against="chosen", baseline="reference"
            )
    assert found.questions_kept == 0


def test_the_key_comes_from_the_environment_alone(tmp_path, monkeypatch):
    with chat_server(reply, key="secret") as chat:
        with pytest.raises(CwpoError, match=r"401 .*CWPO_LLM_JUDGE_KEY"):
            compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
        # That of the service is not for others.
        monkeypatch.setenv("CWPO_API_KEY", "secret")
        with pytest.raises(CwpoError, match="401"):
            compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
        monkeypatch.setenv("CWPO_LLM_JUDGE_KEY", "secret")
        compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
    assert "secret" not in (tmp_path / "kept.jsonl").read_text()


def test_a_wrong_address_is_told_before_anything_is_asked(tmp_path):
    with chat_server(reply) as chat:
        chat.url += "/chat"
        with pytest.raises(CwpoError, match=r"404 .*--llm-judge"):
            compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
    with pytest.raises(CwpoError, match="no answer from"):
        compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
    assert not (tmp_path / "kept.jsonl").exists()


def test_what_is_no_chat_completion_is_refused(tmp_path):
    with chat_server(reply) as chat:
        chat.failures = [(200, {}, "<html>")]
        with pytest.raises(CwpoError, match="no chat completion"):
            compare(chat, tmp_path / "kept.jsonl", {"cw": ["longest"]}, ["short"])
