"""What texts share is read once: requests are ordered, and batches filled, by what is read."""

import random
from itertools import combinations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cwpo import Triplet
from cwpo.types import ScoreItem
from cwpo_annotator import Annotator
from cwpo_annotator.backends.torch.rows.packing import pack_texts

PROMPTS = 4
RESPONSES = [f"{letter} is a letter of its own" for letter in "abcd"]


@pytest.fixture(scope="module")
def load(tiny_annotator):
    return lambda: Annotator.load(tiny_annotator, dtype="float32", device="cpu", threads=1)


@pytest.fixture(scope="module")
def annotator(load):
    return load()


@pytest.fixture(scope="module")
def triplets():
    """All pairs of four responses to each of four prompts, mixed up."""
    found = [
        Triplet(
            id=f"{prompt} {a} {b}",
            prompt=f"what is number {prompt}, and " * 8,
            response_a=RESPONSES[a],
            response_b=RESPONSES[b],
        )
        for prompt in range(PROMPTS)
        for a, b in combinations(range(len(RESPONSES)), 2)
    ]
    random.Random(0).shuffle(found)
    return found


@pytest.fixture(scope="module")
def tokens_of_prompt(annotator, triplets):
    """The tokens to read for all pairs of one prompt together."""
    pairs = annotator.encode([triplet for triplet in triplets if triplet.id[0] == "0"])
    (row,) = pack_texts([text for pair in pairs for text in pair.texts], 10_000)
    assert sum(pair.tokens for pair in pairs) > 5 * len(row.ids)
    return len(row.ids)


@pytest.fixture
def asked(serve, load):
    """`asked(body)`: the answer of a service to one request, and its samples afterwards."""

    def ask(route, body, **settings):
        with serve(load, **settings) as service:
            answer = service.http.post(route, json=body).json()
            families = text_string_to_metric_families(service.http.get("/metrics").text)
            return answer, {s.name: s.value for family in families for s in family.samples}

    return ask


def body_of(triplets):
    return {"triplets": [triplet.model_dump() for triplet in triplets]}


def test_a_request_is_read_prompt_by_prompt_in_few_batches(
    asked, annotator, triplets, tokens_of_prompt
):
    # One pair of the third prompt would fit, and is read with the others in the next batch.
    budget = 11 * tokens_of_prompt // 4
    answer, samples = asked("/annotate", body_of(triplets), token_budget=budget)
    assert samples["cwpo_batch_items_sum"] == len(triplets)
    assert samples["cwpo_batch_items_count"] == PROMPTS / 2
    # The prompts begin with the same few tokens, too.
    expected = pytest.approx(PROMPTS * tokens_of_prompt, rel=0.05)
    assert samples["cwpo_batch_tokens_sum"] == expected
    assert samples["cwpo_queue_tokens"] == 0
    labels = {label["id"]: label for label in answer["annotations"]}
    assert [*labels] == [triplet.id for triplet in triplets]
    for triplet in triplets:
        (alone,) = annotator.annotate([triplet])
        scores = labels[triplet.id]["score_a"], labels[triplet.id]["score_b"]
        assert scores == pytest.approx((alone.score_a, alone.score_b), abs=1e-5)


def test_each_batch_counts_what_it_reads_again(asked, annotator, triplets, tokens_of_prompt):
    budget = tokens_of_prompt - 1
    _, samples = asked("/annotate", body_of(triplets), token_budget=budget)
    # No prompt fits into one batch, so that each is read at least twice.
    pairs = annotator.encode(triplets)
    prompt = min(pair.tokens - len(next(pack_texts(pair.texts, 10_000)).ids) for pair in pairs)
    tokens = samples["cwpo_batch_tokens_sum"]
    assert PROMPTS * (tokens_of_prompt + prompt) <= tokens
    assert tokens <= samples["cwpo_batch_items_count"] * budget
    assert samples["cwpo_queue_tokens"] == 0


def test_responses_that_are_scored_alone_are_read_prompt_by_prompt(
    asked, annotator, triplets, tokens_of_prompt
):
    items = [ScoreItem(prompt=t.prompt, response=t.response_a) for t in triplets]
    items += [ScoreItem(prompt=t.prompt, response=t.response_b) for t in triplets]
    answer, samples = asked(
        "/score",
        {"items": [item.model_dump() for item in items]},
        token_budget=PROMPTS * tokens_of_prompt,
    )
    assert samples["cwpo_batch_items_count"] == 1
    expected = annotator.score_texts(annotator.encode_texts(items)).values
    assert [score["score"] for score in answer["scores"]] == pytest.approx(expected, abs=1e-5)


def test_usage_counts_each_text_by_itself(asked, annotator, triplets):
    answer, _ = asked("/annotate", body_of(triplets))
    tokens = sum(pair.tokens for pair in annotator.encode(triplets))
    assert answer["usage"] == {"triplets": len(triplets), "tokens": tokens}
