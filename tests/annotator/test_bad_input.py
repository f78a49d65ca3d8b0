"""Input and weights that give no score: an error that names itself, and the others unharmed."""

import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cwpo import Message, Triplet
from cwpo.types import ScoreItem
from cwpo_annotator import Annotator

GOOD = [
    Triplet(id="first", prompt="why cat", response_a="because good", response_b="no"),
    Triplet(id="last", prompt="thanks", response_a="please", response_b="sorry " * 20),
]
HUGE = "cat " * 2_500_000
BAD = {
    "empty": (Triplet(prompt="why", response_a="", response_b="good"), "empty_response"),
    "blank": (Triplet(prompt="why", response_a="good", response_b=" \n\t"), "empty_response"),
    "surrogate": (
        Triplet.model_construct(id=None, prompt="\ud83d", response_a="good", response_b="bad"),
        "invalid_text",
    ),
    "long response": (
        Triplet(prompt="why", response_a="cat " * 300, response_b="good"),
        "too_long",
    ),
    "huge prompt": (Triplet(prompt=HUGE, response_a="good", response_b="bad"), "too_long"),
    "huge chat": (
        Triplet(prompt=[Message(role="user", content=HUGE)], response_a="good", response_b="bad"),
        "too_long",
    ),
    "huge response": (Triplet(prompt="why", response_a="good", response_b=HUGE), "too_long"),
}


@pytest.fixture(scope="module")
def annotator(tiny_annotator):
    return Annotator.load(tiny_annotator, dtype="float32", device="cpu")


def test_each_bad_item_is_named_and_the_others_are_scored_as_ever(annotator):
    bad = [triplet.model_copy(update={"id": name}) for name, (triplet, _) in BAD.items()]
    first, *failed, last = annotator.annotate([GOOD[0], *bad, GOOD[1]])
    assert [first, last] == annotator.annotate(GOOD)
    assert {item.id: item.error.code for item in failed} == {
        name: code for name, (_, code) in BAD.items()
    }
    for item in failed:
        # Ten megabytes are not tokenised: their size is known in characters only.
        unit = "10,000," if item.id.startswith("huge") else ""
        assert unit in item.error.detail
        assert len(item.error.detail) < 200


def test_a_huge_prompt_is_cut_to_its_end_where_that_is_asked(annotator):
    short = [
        Triplet(prompt="cat " * 1000 + "end", response_a="good", response_b="bad " * 30),
        Triplet(
            prompt=[Message(role="user", content="cat " * 1000 + "end")],
            response_a="good",
            response_b="bad " * 30,
        ),
    ]
    huge = [
        Triplet(prompt=HUGE + "end", response_a="good", response_b="bad " * 30),
        Triplet(
            prompt=[Message(role="user", content=HUGE + "end")],
            response_a="good",
            response_b="bad " * 30,
        ),
    ]
    expected = annotator.annotate(short, "prompt_left")
    assert all(annotation.truncated for annotation in expected)
    assert annotator.annotate(huge, "prompt_left") == expected


def test_a_huge_response_is_never_cut(annotator):
    (failed,) = annotator.annotate(
        [Triplet(prompt=HUGE, response_a="good", response_b=HUGE)], "prompt_left"
    )
    assert failed.error.code == "response_too_long"
    assert "10,000,000 characters" in failed.error.detail


def test_scores_of_single_texts_have_the_same_bounds(annotator):
    items = [
        ScoreItem(prompt=HUGE, response="good"),
        ScoreItem(prompt="why", response="good"),
        ScoreItem(prompt="why", response=HUGE),
    ]
    first, good, last = annotator.encode_texts(items)
    assert (first.code, last.code) == ("too_long", "too_long")
    assert good.tokens > 0
    assert annotator.encode_texts(items, "prompt_left")[2].code == "response_too_long"


@pytest.fixture
def broken(tiny_annotator, tmp_path):
    """`broken(change)`: the annotator with changed weights."""

    def build(change):
        folder = tmp_path / "broken"
        shutil.copytree(tiny_annotator, folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder)
        return folder

    return build


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_without_finite_score_spoils_its_own_item_only(
    annotator, tiny_tokenizer, broken, value
):
    (emoji,) = annotator.encode([Triplet(prompt="🐈", response_a="good", response_b="bad")])
    spoilt = emoji.a[0]
    folder = broken(lambda model: model.model.embed_tokens.weight[spoilt].fill_(value))
    other = Annotator.load(folder, dtype="float32", device="cpu")
    triplets = [GOOD[0], Triplet(prompt="🐈", response_a="good", response_b="bad"), GOOD[1]]
    first, failed, last = other.annotate(triplets)
    assert failed.error.code == "non_finite_score"
    for found, alone in zip((first, last), annotator.annotate(GOOD), strict=True):
        assert found.score_a == pytest.approx(alone.score_a, abs=1e-5)
        assert found.score_b == pytest.approx(alone.score_b, abs=1e-5)


def test_a_head_that_overflows_gives_errors_and_no_labels(broken):
    folder = broken(lambda model: model.score.weight.fill_(3e38))
    failed = Annotator.load(folder, dtype="float32", device="cpu").annotate(GOOD)
    assert [item.error.code for item in failed] == ["non_finite_score"] * 2
