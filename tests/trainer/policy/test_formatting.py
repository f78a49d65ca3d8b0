from __future__ import annotations

import copy
import json
from functools import partial

import pytest
from datasets import Dataset
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwpo.types import Message
from cwpo_trainer import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.policy.formatting import Formatter

TRANSCRIPT = "\n\nHuman: hello\n\nAssistant:"


@pytest.fixture
def plain_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def laid_out(tokenizer, prompt, response="no one"):
    formatter = Formatter(tokenizer)
    (text,) = formatter.tokenise([prompt], [response])
    assert formatter.opening_ids([prompt]) == [text.prompt_ids]
    return tokenizer.decode(text.prompt_ids), tokenizer.decode(text.response_ids)


def test_a_text_prompt_becomes_a_user_message(tiny_tokenizer):
    expected = ("<|user|>who<|end|><|assistant|>", "no one<|end|>")
    assert laid_out(tiny_tokenizer, "who") == expected
    assert laid_out(tiny_tokenizer, [Message(role="user", content="who")]) == expected


def test_a_transcript_stays_plain_text(tiny_tokenizer):
    assert laid_out(tiny_tokenizer, TRANSCRIPT) == (TRANSCRIPT, " no one<eos>")
    assert laid_out(tiny_tokenizer, TRANSCRIPT, " no one") == (TRANSCRIPT, " no one<eos>")


def test_without_a_template_text_and_response_stand_apart(plain_tokenizer):
    assert laid_out(plain_tokenizer, "who") == ("who\n\n", "no one<eos>")
    assert laid_out(plain_tokenizer, "who\n") == ("who\n", "no one<eos>")


def test_without_a_template_chat_becomes_a_transcript(plain_tokenizer):
    chat = [
        Message(role="user", content="hi"),
        Message(role="assistant", content="yes"),
        Message(role="user", content="so"),
    ]
    expected = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant:"
    assert laid_out(plain_tokenizer, chat) == (expected, " no one<eos>")


def test_an_answer_is_given_the_form_of_training_data(tiny_tokenizer):
    formatter = Formatter(tiny_tokenizer)
    assert formatter.answer(TRANSCRIPT, " Sure\n\nHuman: and") == " Sure"
    assert formatter.answer("who", "\n me ") == "me"


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": [{"role": "user", "content": "who are you"}],
            "chosen": [{"role": "assistant", "content": "I am good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {"prompt": TRANSCRIPT, "chosen": " I am good", "rejected": " bad"},
    ],
)
def test_token_ids_are_those_of_trl(row, tiny_causal, tiny_tokenizer, tmp_path):
    trainer = ConfidenceDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_causal),
        args=ConfidenceDPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True),
        train_dataset=Dataset.from_list([row | {"confidence": 0.5}]),
        processing_class=copy.deepcopy(tiny_tokenizer),
    )
    theirs = trainer.train_dataset[0]
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = [Message(**turn) for turn in prompt]
    formatter = Formatter(tiny_tokenizer)
    chosen, rejected = formatter.tokenise([prompt, prompt], ["I am good", "bad"])
    assert (chosen.prompt_ids, chosen.response_ids) == (theirs["prompt_ids"], theirs["chosen_ids"])
    assert rejected.response_ids == theirs["rejected_ids"]


def spaced(tokenizer, **flags):
    """White space before the special token that an answer begins after, which has these flags."""
    tokenizer = copy.deepcopy(tokenizer)
    reply = AddedToken("<|reply|>", normalized=False, special=True, **flags)
    tokenizer.add_tokens([reply], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '  <|reply|>' if m.role == 'assistant' else '<|user|>' }}"
        "{{ m.content }}{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}  <|reply|>{% endif %}"
    )
    return tokenizer


def across(tokenizer):
    """With a token that begins before that one, and ends within it."""
    tokenizer = spaced(tokenizer)
    tokenizer.add_tokens([AddedToken(" <|rep", normalized=False)])
    return tokenizer


def beginning(tokenizer):
    """Without a template, each text begins with a special token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 5)]
    )
    return tokenizer


def marking_words(tokenizer):
    """The first word of a text is marked as one within it is."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Metaspace(prepend_scheme="first", replacement="a")
    return tokenizer


@pytest.mark.parametrize(
    "kind",
    [
        *(copy.deepcopy, spaced, partial(spaced, lstrip=True), partial(spaced, rstrip=True)),
        *(across, beginning, marking_words),
    ],
    ids=["plain", "spaced", "lstrip", "rstrip", "across", "beginning", "marked"],
)
def test_ids_are_those_of_the_whole_texts(kind, tiny_tokenizer):
    tokenizer = kind(tiny_tokenizer)
    prompts = ["who", "who ", " what <|end|> is", "<|user|>", TRANSCRIPT, "who", "who<|assistant"]
    responses = ["no one", " no", "<|end|> yes", "", "Sure", "<|assistant|>", "|> see"]
    chats = [[Message(role="user", content=prompt)] for prompt in prompts]
    texts = Formatter(tokenizer).tokenise([*prompts, *chats], responses * 2)
    for prompt, response, text in zip([*prompts, *chats], responses * 2, texts, strict=True):
        if prompt == TRANSCRIPT:
            whole = tokenizer(f"{TRANSCRIPT} {response}<eos>").input_ids
        else:
            content = prompt if isinstance(prompt, str) else prompt[0].content
            turns = [{"role": "user", "content": content}]
            answer = {"role": "assistant", "content": response}
            written = tokenizer.apply_chat_template([*turns, answer], tokenize=False)
            opening = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            whole, opening = (
                tokenizer(part, add_special_tokens=False).input_ids for part in (written, opening)
            )
            assert text.prompt_ids == whole[: len(text.prompt_ids)]
            alike = [left == right for left, right in zip(whole, opening, strict=False)]
            assert len(text.prompt_ids) == (alike.index(False) if False in alike else len(alike))
        assert text.prompt_ids + text.response_ids == whole


@pytest.mark.parametrize("template", [True, False], ids=["template", "plain"])
def test_policies_read_the_tokens_that_they_were_trained_on(real_models, request, template):
    folder = request.config.rootpath / "tests" / "annotator" / "encoding"
    golden = json.loads((folder / "golden_token_ids.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(real_models / "smollm2")
    if not template:
        tokenizer.chat_template = None
    prompts = [
        prompt if isinstance(prompt, str) else [Message.model_validate(turn) for turn in prompt]
        for prompt, *_ in golden["cases"]
    ]
    formatter = Formatter(tokenizer)
    texts = formatter.tokenise(prompts, [response for _, response, _ in golden["cases"]])
    openings = formatter.opening_ids(prompts)
    found = [
        [text.prompt_ids, text.response_ids, opening]
        for text, opening in zip(texts, openings, strict=True)
    ]
    assert found == golden["policies"]["smollm2" if template else "smollm2 without template"]
