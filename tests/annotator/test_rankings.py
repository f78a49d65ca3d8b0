"""Rankings of several responses, by an annotator in this process."""

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from cwpo import FailedAnnotation, Message, RankItem, Triplet
from cwpo.types import ScoreItem
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import EncodingSpec
from cwpo_annotator.encoded import EncodedResponses, EncodedText
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.responses import ResponseEncoder
from cwpo_annotator.rankings import ranked
from cwpo_annotator.scores import Scores

ITEMS = [
    RankItem(prompt="why cat", responses=["because good", "no", "please " * 9, "sorry"]),
    RankItem(id="emoji", prompt="thanks", responses=["🐈 please", "sorry " * 20]),
    RankItem(prompt="the word", responses=["same", "other", "same"]),
]


@pytest.fixture(scope="module")
def annotator(tiny_annotator):
    return Annotator.load(tiny_annotator)


def test_responses_are_ordered_by_the_scores_that_annotations_have(annotator):
    rankings = annotator.rank(ITEMS)
    assert [each.id for each in rankings] == ["0", "emoji", "2"]
    for item, ranking in zip(ITEMS, rankings, strict=True):
        triplets = [
            Triplet(prompt=item.prompt, response_a=response, response_b=item.responses[0])
            for response in item.responses
        ]
        scores = [label.score_a for label in annotator.annotate(triplets)]
        np.testing.assert_allclose(ranking.scores, scores, atol=1e-5)
        ordered = [ranking.scores[at] for at in ranking.order]
        assert ordered == sorted(ordered, reverse=True)
        assert sorted(ranking.order) == list(range(len(item.responses)))
        expected = [math.tanh((better - worse) / 2) for better, worse in pairwise(ordered)]
        np.testing.assert_allclose(ranking.confidence, expected, atol=1e-6)


def test_equal_responses_tie_by_index(annotator):
    ranking = annotator.rank(ITEMS)[2]
    assert ranking.order in ([0, 2, 1], [1, 0, 2])
    assert ranking.scores[0] == ranking.scores[2]
    assert 0.0 in ranking.confidence


def of_scores(*scores, temperature=None):
    encoded = [
        EncodedResponses([EncodedText([1])] * len(some), range(len(some))) for some in scores
    ]
    flat = np.array([score for some in scores for score in some], np.float32)
    ids = [f"item-{at}" for at in range(len(scores))]
    return ranked(ids, encoded, Scores(flat), temperature)


def test_equal_scores_keep_the_order_of_their_responses():
    (row,) = of_scores([1.0, 2.0, 1.0, 2.0, 3.0])
    assert row["order"] == [4, 1, 3, 0, 2]
    assert row["scores"] == [1.0, 2.0, 1.0, 2.0, 3.0]
    sure = math.tanh(0.5)
    assert row["confidence"] == pytest.approx([sure, 0, sure, 0])


def test_each_items_confidence_is_between_its_own_responses():
    first, second = of_scores([1.0, 2.0], [9.0, 5.0, 5.5], temperature=2.0)
    assert (first["order"], second["order"]) == ([1, 0], [0, 2, 1])
    assert first["confidence"] == pytest.approx([math.tanh(0.5)])
    assert second["confidence"] == pytest.approx([math.tanh(3.5 / 2), math.tanh(0.25)])
    assert second["calibrated_confidence"] == pytest.approx([math.tanh(3.5 / 4), math.tanh(0.125)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error_of_the_item_alone(bad):
    first, failed, last = of_scores([1.0, 2.0], [1.0, bad, 3.0], [4.0, 3.0])
    assert failed["id"] == "item-1"
    assert failed["error"].code == "non_finite_score"
    assert (first["order"], last["order"]) == ([1, 0], [0, 1])


def test_what_the_memory_could_not_hold_is_said_to_be_that():
    encoded = [EncodedResponses([EncodedText([1])] * 2, [0, 1])]
    scores = Scores(np.array([1, np.nan], np.float32), np.array([False, True]))
    (row,) = ranked(["x"], encoded, scores)
    assert row["error"].code == "out_of_memory"


def test_an_item_with_an_empty_response_is_an_error_and_the_others_are_ranked(annotator):
    bad = RankItem(prompt="why", responses=["so", " "])
    first, failed, last = annotator.rank([ITEMS[0], bad, ITEMS[1]])
    assert isinstance(failed, FailedAnnotation)
    assert failed.error.detail == "responses[1] is empty"
    assert [first, last] == annotator.rank([ITEMS[0], ITEMS[1]])


LONG = RankItem(
    prompt="first " + "cat " * 80 + "last", responses=["good help", "bad " * 20, "no", "why not"]
)


@pytest.fixture(params=[Encoder, ResponseEncoder])
def encoder(request, tiny_tokenizer):
    return request.param(tiny_tokenizer, EncodingSpec(max_length=64, pad_token="<pad>"))


def test_a_prompt_is_cut_for_all_responses_so_that_the_longest_fits(encoder):
    (texts,) = encoder.encode_responses([(LONG.prompt, LONG.responses)], "prompt_left")
    assert [text.truncated for text in texts] == [True] * 4
    assert max(text.tokens for text in texts) == 64
    decode = encoder.tokenizer.decode
    prompts = set()
    for text, response in zip(texts, LONG.responses, strict=True):
        whole = decode(text.ids)
        assert whole.endswith(f"last\n\n{response}<eos>")
        prompts.add(whole.removesuffix(f"{response}<eos>"))
    assert len(prompts) == 1


def test_one_response_too_long_refuses_the_item(encoder):
    items = [(LONG.prompt, LONG.responses), ("why", ["so", "bad " * 80]), ("why", ["so", "no"])]
    too_long, response_too_long, good = encoder.encode_responses(items)
    assert too_long.code == response_too_long.code == "too_long"
    assert len(good) == 2
    cut, response_too_long, good = encoder.encode_responses(items, "prompt_left")
    assert (len(cut), response_too_long.code, len(good)) == (4, "response_too_long", 2)


def test_responses_start_where_they_do_in_a_pair(tiny_tokenizer):
    encoder = ResponseEncoder(tiny_tokenizer, EncodingSpec(max_length=64, pad_token="<pad>"))
    for prompt in ("why", "th", LONG.prompt):
        responses = [" cat", "e word", " not"]
        (texts,) = encoder.encode_responses([(prompt, responses)], "prompt_left")
        (start,) = {text.start for text in texts}
        assert len({tuple(text.ids[:start]) for text in texts}) == 1
        triplet = Triplet(prompt=prompt, response_a=" cat", response_b="e word")
        (pair,) = encoder.encode_pairs([triplet], "prompt_left")
        assert (start, list(pair.a)) == (pair.start, list(texts[0].ids))


def test_a_ranking_of_one_cut_alike_differs_from_texts_cut_each_for_itself(annotator):
    prompt = "the cat " * 60
    item = RankItem(prompt=prompt, responses=["good", "bad " * 40])
    (ranking,) = annotator.rank([item], "prompt_left")
    assert ranking.truncated
    singles = annotator.encode_texts(
        [ScoreItem(prompt=prompt, response=each) for each in item.responses], "prompt_left"
    )
    alone = annotator.score_texts(singles).values
    (together,) = annotator.annotate(
        [Triplet(prompt=prompt, response_a="good", response_b="bad " * 40)], "prompt_left"
    )
    np.testing.assert_allclose(ranking.scores, [together.score_a, together.score_b], atol=1e-5)
    assert abs(alone[0] - ranking.scores[0]) > 1e-4


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_huge_prompt_is_there_once_however_many_responses_it_has(encoder, is_chat):
    huge = "cat " * 500_000
    prompt = [Message(role="user", content=huge)] if is_chat else huge
    short = [Message(role="user", content=huge[-8000:])] if is_chat else huge[-8000:]
    responses = ["good", "bad " * 20, *(f"word {n}" for n in range(62))]
    tracemalloc.start()
    (texts,) = encoder.encode_responses([(prompt, responses)], "prompt_left")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * len(huge)
    (expected,) = encoder.encode_responses([(short, responses)], "prompt_left")
    assert [text.ids for text in texts] == [text.ids for text in expected]
    assert all(text.truncated for text in texts)
