"""The SDK's reward function and judge, in the shapes in which TRL calls them."""

import pytest

from cwpo import Client, Triplet
from cwpo.errors import CwpoError, DatasetError
from cwpo.trl import PairwiseJudge, reward_function, to_trl
from harness import labels_of, serving

PROMPTS = ["why?", "how?", "when?"]
COMPLETIONS = ["because", "so", "now"]
OTHERS = ["no idea", "thus", "never"]


def turns(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture(scope="module")
def client():
    with serving() as service, Client(service.url) as client:
        yield client


@pytest.fixture(scope="module")
def expected():
    """What the annotator says of the same texts without a service."""
    triplets = [
        Triplet(prompt=prompt, response_a=a, response_b=b)
        for prompt, a, b in zip(PROMPTS, COMPLETIONS, OTHERS, strict=True)
    ]
    return labels_of(triplets)


def test_rewards_are_the_annotators_scores(client, expected):
    reward = reward_function(client)
    # TRL also passes the dataset's columns and its own state.
    rewards = reward(
        prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 3, trainer_state=None
    )
    assert rewards == [label.score_a for label in expected]
    assert reward.__name__ == "annotator_reward"


def test_conversations_are_scored_too(client):
    prompts = [turns("user", prompt) for prompt in PROMPTS]
    completions = [turns("assistant", text) for text in COMPLETIONS]
    rewards = reward_function(client)(prompts=prompts, completions=completions)
    assert rewards == reward_function(client)(prompts=prompts, completions=COMPLETIONS)
    assert len(set(rewards)) == 3


def test_more_completions_than_a_request_takes_come_back_in_order():
    with serving(max_triplets=256) as service, Client(service.url) as client:
        reward = reward_function(client)
        many = [f"answer {n}" for n in range(600)]
        rewards = reward(prompts=["why?"] * 600, completions=many)
        assert len(rewards) == 600
        assert reward(prompts=["why?"] * 2, completions=many[299:301]) == rewards[299:301]


def test_a_completion_that_cannot_be_scored_has_no_reward(client):
    rewards = reward_function(client)(prompts=PROMPTS, completions=["because", "", "now"])
    assert [reward is None for reward in rewards] == [False, True, False]


def test_without_a_service_there_are_no_rewards():
    with Client("http://127.0.0.1:9", max_retries=0) as client, pytest.raises(CwpoError):
        reward_function(client)(prompts=PROMPTS, completions=COMPLETIONS)


def test_the_judge_names_the_better_completion(client, expected):
    pairs = [list(pair) for pair in zip(COMPLETIONS, OTHERS, strict=True)]
    ranks = PairwiseJudge(client).judge(PROMPTS, pairs)
    assert ranks == [{"a": 0, "b": 1}[label.preferred] for label in expected]
    swapped = PairwiseJudge(client).judge(PROMPTS, [pair[::-1] for pair in pairs])
    assert swapped == [1 - rank for rank in ranks]


def test_the_judge_has_no_opinion_on_a_tie_or_an_empty_completion(client):
    judge = PairwiseJudge(client)
    assert judge.judge(["why?", "why?"], [["same", "same"], ["", "because"]]) == [-1, -1]


def test_annotated_pairs_are_a_dataset_for_trl(client, expected):
    pairs = zip(PROMPTS, COMPLETIONS, OTHERS, strict=True)
    rows = [{"question": prompt, "first": a, "second": b} for prompt, a, b in pairs]
    rows.insert(1, {"question": "empty?", "first": " ", "second": "b"})
    names = {"prompt": "question", "response_a": "first", "response_b": "second"}
    for labels in (client.annotate(rows, columns=names), client.annotate_iter(rows, columns=names)):
        dataset = to_trl(rows, labels, columns=names)
        assert dataset["prompt"][:] == PROMPTS
        assert dataset["confidence"][:] == [label.confidence for label in expected]
        both = zip(dataset["chosen"], dataset["rejected"], strict=True)
        responses = zip(expected, zip(COMPLETIONS, OTHERS, strict=True), strict=True)
        assert [*both] == [
            pair if label.preferred == "a" else pair[::-1] for label, pair in responses
        ]
    chat = [{"prompt": turns("user", "why?"), "chosen": "so", "rejected": "no"}]
    (row,) = to_trl(chat, client.annotate(chat))
    assert {row["chosen"][0]["role"], row["rejected"][0]["role"]} == {"assistant"}
    empty = client.annotate([*rows[:1], rows[1]], columns=names).annotations[1:]
    with pytest.raises(DatasetError, match="no triplet has a label"):
        to_trl(rows[1:2], empty, columns=names)


def test_what_is_no_pair_or_no_single_answer_is_an_error(client):
    with pytest.raises(CwpoError, match=r"completions\[1\] holds 3"):
        PairwiseJudge(client).judge(PROMPTS[:2], [["a", "b"], ["a", "b", "c"]])
    with pytest.raises(CwpoError, match="2 messages"):
        reward_function(client)(
            prompts=["why?"], completions=[turns("assistant", "a") + turns("user", "b")]
        )


def test_grpo_takes_it_as_a_reward_function(client, tiny_causal, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        str(tiny_causal),
        reward_funcs=reward_function(client),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["why cat", "hello"]}),
    )
    trainer.train()
    (log, *_) = trainer.state.log_history
    assert "rewards/annotator_reward/mean" in log
