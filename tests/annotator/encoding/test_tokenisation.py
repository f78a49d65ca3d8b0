"""Token ids, and where responses start: for annotators, and for policies by their opening."""

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cwpo.types import ItemError, Message, Triplet
from cwpo_annotator.checkpoint import EncodingSpec
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.joining import join_chat, join_text
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_annotator.encoding.responses import PairEncoder, ResponseEncoder
from cwpo_annotator.encoding.tokenisation import (
    opening_ids,
    response_start,
    response_start_after,
    token_ids,
)

# What checkpoints and policies were trained on; written before both shared one way to token ids.
GOLDEN = json.loads((Path(__file__).parent / "golden_token_ids.json").read_text())
PAD_TOKENS = {"smollm2": "<|endoftext|>", "minilm": "[PAD]"}


def prompts():
    for prompt, *_ in GOLDEN["cases"]:
        is_text = isinstance(prompt, str)
        yield prompt if is_text else [Message.model_validate(turn) for turn in prompt]


def tokenizer_of(models, key):
    name, _, without = key.partition(" without ")
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    if without:
        tokenizer.chat_template = None
    return name, tokenizer


@pytest.mark.parametrize("key", GOLDEN["annotators"])
def test_annotators_read_the_tokens_that_they_were_trained_on(real_models, key):
    of_tokenizer, kind = key.split(", ")
    name, tokenizer = tokenizer_of(real_models, of_tokenizer)
    kinds = {kind.__name__: kind for kind in (Encoder, ResponseEncoder, PairEncoder)}
    encoder = kinds[kind](tokenizer, EncodingSpec(max_length=48, pad_token=PAD_TOKENS[name]))
    triplets = [
        Triplet(prompt=prompt, response_a=a, response_b=b)
        for prompt, (_, a, b) in zip(prompts(), GOLDEN["cases"], strict=True)
    ]
    encoded = [
        item.code
        if isinstance(item, ItemError)
        else [item.a, item.b, common_prefix(item.a, item.b), item.start, item.truncated]
        for item in encoder.encode_pairs(triplets, "prompt_left")
    ]
    assert encoded == GOLDEN["annotators"][key]


def ids_and_starts(tokenizer, text):
    (whole,), (opening,) = token_ids(tokenizer, [text]), opening_ids(tokenizer, [text])
    return whole, response_start(tokenizer, text), response_start_after(opening, whole)


def test_a_token_that_holds_both_prompt_and_response_belongs_to_the_response(tiny_tokenizer):
    whole, start, after_opening = ids_and_starts(tiny_tokenizer, join_text("why th", "e cat", ""))
    assert start == after_opening
    assert tiny_tokenizer.decode(whole[:start]) == "why"
    assert tiny_tokenizer.decode(whole[start:]) == " the cat"


def test_white_space_before_a_response_is_the_policys_to_write_where_it_is_another_token(
    real_models,
):
    tokenizer = AutoTokenizer.from_pretrained(real_models / "smollm2")
    whole, start, after_opening = ids_and_starts(tokenizer, join_text("why", "cat", "\n\n"))
    assert tokenizer.decode(whole[start:]) == "cat"
    assert tokenizer.decode(whole[after_opening:]) == "\n\ncat"


def test_a_template_may_open_an_answer_otherwise_than_it_writes_one(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{%", "<|assistant|>so{%"
    )
    text = join_chat(tokenizer, [Message(role="user", content="why")], "because")
    assert text.opening == "<|user|>why<|end|><|assistant|>so"
    assert text.text == "<|user|>why<|end|><|assistant|>because<|end|>"
    whole, start, after_opening = ids_and_starts(tokenizer, text)
    assert start == after_opening
    assert tokenizer.decode(whole[start:]) == "because<|end|>"


def test_padding_and_truncation_of_an_earlier_call_change_nothing(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    texts = [join_text("why", "because good people", " "), join_text("why", "no", " ")]
    expected = token_ids(tokenizer, texts)
    tokenizer(["a b c d", "a"], padding="max_length", truncation=True, max_length=3)
    assert token_ids(tokenizer, texts) == expected
    assert len(expected[0]) > 3
