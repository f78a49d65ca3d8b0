from __future__ import annotations

import copy
import json

import pytest
from datasets import Dataset
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
