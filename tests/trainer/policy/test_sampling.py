from __future__ import annotations

import pytest
import torch

from cwpo_trainer.policy.sampling import LoadedPolicy, Sampling

PROMPTS = ["who", "what about the water " * 5, "why not", "hello " * 12, "when"]


def sampling(**more):
    return Sampling(**{"max_new_tokens": 6, "temperature": 0, "batch_size": 8, "seed": 0} | more)


@pytest.fixture(scope="module")
def policy(tiny_causal):
    return LoadedPolicy(str(tiny_causal), "float32")


def test_batches_keep_to_the_budget_with_similar_lengths_together():
    lengths = [3, 10, 4, 9, 2]
    assert sampling(token_budget=32).batches(lengths) == [[1, 3], [2, 0, 4]]
    assert sampling(token_budget=32, batch_size=2).batches(lengths) == [[1, 3], [2, 0], [4]]
    # A prompt that is larger than the budget is a batch of its own.
    assert sampling(token_budget=1).batches([3, 5]) == [[1], [0]]
    assert sampling().batches(lengths) == [[1, 3, 2, 0, 4]]
    assert sampling().batches([]) == []
    # Processes that share a policy make as many batches of as many prompts, however long these are.
    for lengths in ([94, 94, *[60] * 6], [5] * 8):
        assert [*map(len, sampling(batch_size=2).batches(lengths))] == [2] * 4


def test_how_prompts_are_batched_changes_no_likeliest_answer(policy):
    alone = [policy.answers([prompt], sampling(), None)[0] for prompt in PROMPTS]
    for more in ({}, {"token_budget": 40}, {"batch_size": 2}):
        assert policy.answers(PROMPTS, sampling(**more), None) == alone


def test_answers_are_drawn_by_the_seed(policy):
    first, again, other = (
        policy.sample(PROMPTS, sampling(temperature=1.5, seed=seed), None) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_an_answer_has_the_tokens_up_to_its_end(policy, monkeypatch):
    answer = policy.tokenizer(" yes", add_special_tokens=False).input_ids
    end, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    written = [[*answer, end, pad], [*answer, *answer][: len(answer) + 2]]
    written[1] += [answer[0]] * (len(written[0]) - len(written[1]))
    # Transformers' own way of saying what a model continues with.
    monkeypatch.setattr(
        policy.model,
        "generate",
        lambda input_ids, **_: torch.cat([input_ids, torch.tensor(written)], dim=1),
    )
    ended, cut = policy.answers(["why", "who"], sampling(), None)
    assert (ended.text, ended.has_ended) == ("yes", True)
    assert ended.tokens.response_ids == [*answer, end]
    assert ended.tokens.prompt_ids == policy.formatter.opening_ids(["why"])[0]
    assert not cut.has_ended
    assert cut.tokens.response_ids == written[1]
