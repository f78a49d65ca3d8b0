from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from cwpo.types import Message
from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.policy.end_of_turn import end_of_turn
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.policy.sampling import LoadedPolicy, Sampling
from cwpo_trainer.run.folder import read_record

from ..samples import weighted, write_lines

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Its EOS ends a conversation, not a turn.
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@pytest.fixture
def tokenizer_with(tiny_tokenizer):
    """A tokenizer with a template, and with special tokens beside the EOS of texts."""

    def build(template, *special, eos="<eos>"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
        tokenizer.eos_token = eos
        tokenizer.chat_template = template
        return tokenizer

    return build


IM_ENDS = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")


@pytest.mark.parametrize(
    ("template", "special", "eos", "end", "written"),
    [
        (CHATML, IM_ENDS, "<eos>", "<|im_end|>", "no one<|im_end|>\n"),
        (CHATML, IM_ENDS, "<|im_end|>", "<|im_end|>", "no one<|im_end|>\n"),
        (LLAMA_3, HEADERS, "<eos>", "<|eot_id|>", "no one<|eot_id|>"),
        (GEMMA, TURNS, "<eos>", "<end_of_turn>", "no one<end_of_turn>\n"),
        (MISTRAL, ("</s>",), "</s>", "</s>", " no one</s>"),
        (PHI_3, (), "<eos>", "<|end|>", "no one<|end|>\n<eos>"),
        # A template without an end of its own is given one.
        (PLAIN, (), "<eos>", None, "no one\n\n<eos>"),
        (None, (), "<eos>", None, " no one<eos>"),
    ],
)
def test_the_template_says_what_ends_an_answer(
    template, special, eos, end, written, tokenizer_with
):
    tokenizer = tokenizer_with(template, *special, eos=eos)
    assert end_of_turn(tokenizer) == end
    (text,) = Formatter(tokenizer).tokenise([[Message(role="user", content="who")]], ["no one"])
    assert tokenizer.decode(text.response_ids) == written


@pytest.fixture
def base_model(tokenizer_with, tmp_path):
    """The folder of a random model with ChatML, whose generation stops at the EOS of texts only."""
    torch.manual_seed(0)
    tokenizer = tokenizer_with(CHATML, *IM_ENDS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def flags(base_model, tmp_path):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(16))
    return (
        *("--model", base_model, "--data", data, "--batch-size", 16, "--dtype", "float32"),
        *("--gradient-accumulation", 1, "--learning-rate", 1e-2, "--threads", 1),
    )


@pytest.mark.slow
def test_a_base_model_learns_to_stop(flags, base_model, tmp_path, command, capsys):
    sft = tmp_path / "sft"
    command(Sft, *flags, "--max-steps", 40, "--output", sft)
    said = capsys.readouterr().err
    assert said.count("answers end with <|im_end|>") == 1
    assert read_record(sft).results["end_of_turn"] == "<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(sft)
    model = AutoModelForCausalLM.from_pretrained(sft)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in weighted(4):
        opening = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        generated = model.generate(**opening, max_new_tokens=60, do_sample=False)[0]
        answer = generated[opening["input_ids"].shape[1] :].tolist()
        assert len(answer) < 60
        assert answer.index(end) == len(answer) - 1
    # What has been learnt is not said again.
    command(Align, *flags, "--model", sft, "--max-steps", 1, "--output", tmp_path / "aligned")
    assert "answers end with" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Sft, Align])
@pytest.mark.parametrize("lora", [(), ("--lora",)])
def test_servers_read_where_to_stop(kind, lora, flags, base_model, tmp_path, command):
    command(kind, *flags, *lora, "--max-steps", 1, "--output", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stops = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<eos>"]
    assert tokenizer.eos_token == "<eos>"


def test_sampling_stops_at_the_end_of_a_turn(base_model):
    policy = LoadedPolicy(str(base_model), "float32")
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    # Whatever it has read, it writes the end of a turn, and would go on with it.
    torch.nn.init.zeros_(policy.model.lm_head.weight)
    hidden = policy.model.model(torch.tensor([[end]])).last_hidden_state[0, 0]
    with torch.no_grad():
        policy.model.lm_head.weight[end] = hidden
    lengths = []
    generate = policy.model.generate

    def counted(**arguments):
        generated = generate(**arguments)
        lengths.append(generated.shape[1] - arguments["input_ids"].shape[1])
        return generated

    policy.model.generate = counted
    sampling = Sampling(max_new_tokens=8, temperature=0, batch_size=1, seed=0)
    assert policy.sample(["who"], sampling, "answers") == [""]
    assert lengths == [1]
