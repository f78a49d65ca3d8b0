import copy

import pytest

from cwpo import Message, Triplet
from cwpo.types import ItemError, ScoreItem
from cwpo_annotator.checkpoint import CheckpointError, EncodingSpec
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.encoding.encoder import Encoder


@pytest.fixture
def encoder(tiny_tokenizer):
    return Encoder(copy.deepcopy(tiny_tokenizer), EncodingSpec(max_length=64, pad_token="<pad>"))


def text_of(encoder, prompt, response):
    (encoded,) = encoder.encode_texts([ScoreItem(prompt=prompt, response=response)])
    return encoder.tokenizer.decode(encoded.ids)


@pytest.mark.parametrize(
    ("prompt", "response", "joined"),
    [
        ("Why?", "Because.", "Why?\n\nBecause.<eos>"),
        (
            "\n\nHuman: Why?\n\nAssistant:",
            " Because.",
            "\n\nHuman: Why?\n\nAssistant: Because.<eos>",
        ),
        ("Why? ", "Because.", "Why? Because.<eos>"),
        ("", "Because.", "Because.<eos>"),
    ],
)
def test_text_prompts_are_joined_once_and_end_with_eos(encoder, prompt, response, joined):
    assert text_of(encoder, prompt, response) == joined


def test_chat_prompts_go_through_the_chat_template(encoder):
    prompt = [Message(role="user", content="Why?")]
    assert text_of(encoder, prompt, "Because.") == (
        "<|user|>Why?<|end|><|assistant|>Because.<|end|><eos>"
    )


def test_chat_prompts_without_a_template_become_a_transcript(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, EncodingSpec(max_length=64, pad_token="<pad>"))
    prompt = [Message(role="user", content="Why?")]
    assert text_of(encoder, prompt, "Because.") == ("\n\nHuman: Why?\n\nAssistant: Because.<eos>")


def test_prompt_and_response_are_tokenised_together(encoder):
    (encoded,) = encoder.encode_texts([ScoreItem(prompt="th", response=" cat")])
    expected = encoder.tokenizer("th cat", add_special_tokens=True)["input_ids"]
    assert list(encoded.ids) == [*expected, encoder.tokenizer.eos_token_id]


def test_a_text_over_the_limit_is_an_error_by_default(encoder):
    (result,) = encoder.encode_texts([ScoreItem(prompt="cat " * 200, response="good")])
    assert isinstance(result, ItemError)
    assert result.code == "too_long"
    assert "64" in result.detail


def test_prompt_left_drops_the_oldest_prompt_tokens_of_both_and_no_response_token(encoder):
    triplet = Triplet(
        prompt="first " + "cat " * 80 + "last", response_a="good help", response_b="bad " * 20
    )
    (pair,) = encoder.encode_pairs([triplet], "prompt_left")
    assert isinstance(pair, EncodedPair)
    assert pair.truncated
    decode = encoder.tokenizer.decode
    assert max(len(pair.a), len(pair.b)) == 64
    assert decode(pair.a).endswith("last\n\ngood help<eos>")
    assert decode(pair.b).endswith("last\n\n" + "bad " * 20 + "<eos>")
    assert decode(pair.a)[: -len("good help<eos>")] == decode(pair.b)[: -len("bad " * 20 + "<eos>")]
    assert "first" not in decode(pair.a)


def test_a_response_is_never_cut(encoder):
    (result,) = encoder.encode_texts(
        [ScoreItem(prompt="why", response="cat " * 200)], "prompt_left"
    )
    assert isinstance(result, ItemError)
    assert result.code == "response_too_long"


def test_a_chat_template_that_refuses_is_that_items_error_alone(encoder):
    encoder.tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    )
    refused = ScoreItem(prompt=[Message(role="assistant", content="no")], response="good")
    first, second = encoder.encode_texts([refused, ScoreItem(prompt="why", response="because")])
    assert isinstance(first, ItemError)
    assert "user first" in first.detail
    assert isinstance(second, EncodedText)


def test_the_pad_token_may_not_be_the_end_of_sequence(tiny_tokenizer):
    with pytest.raises(CheckpointError, match="pad token"):
        Encoder(tiny_tokenizer, EncodingSpec(max_length=64, pad_token="<eos>"))


def test_smollm2_gets_a_pad_token_of_its_own(real_models):
    encoder = Encoder.create(real_models / "smollm2")
    assert encoder.spec.pad_token == "<|endoftext|>"
    assert encoder.pad_token_id != encoder.tokenizer.eos_token_id


def test_max_length_is_lowered_to_the_models_positions(real_models):
    assert Encoder.create(real_models / "minilm", max_length=1024).max_length == 512
