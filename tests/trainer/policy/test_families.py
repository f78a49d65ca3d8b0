"""Families of models, with their published templates and special tokens, from end to end."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from cwpo.types import Message
from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.policy.formatting import Formatter

from ..samples import weighted, write_lines

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256
)
GATED = SMALL | dict(intermediate_size=64, num_key_value_heads=2)
MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
DROPOUT = "its attention has dropout"
BALANCE = "the balance of a mixture of experts is that of a whole batch"


def published(name: str) -> str:
    """The template of a family, of which TRL keeps copies to know models by."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@dataclass(frozen=True)
class Family:
    """A tiny random checkpoint.

    template: None for a base model without one; tokens: beside those with a role; strips: of them,
    those that swallow the white space after them, as in Phi-3; plain: those that are not special;
    stops: where its generation config has generation stop; end: what ends an answer, None for EOS
    after a text without a template; unpacked: why SFT and alignment read each text by itself.
    """

    config: type[PretrainedConfig]
    sizes: dict[str, Any]
    template: str | None
    eos: str
    bos: str | None = None
    pad: str | None = None
    adds_bos: bool = False
    tokens: tuple[str, ...] = ()
    strips: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    end: str | None = None
    unpacked: dict[type, str] = field(default_factory=dict)

    def tokenizer(self, tiny: Any) -> Any:
        tokenizer = copy.deepcopy(tiny)
        roles = {"eos_token": self.eos, "bos_token": self.bos, "pad_token": self.pad}
        tokens = {*self.tokens, *filter(None, roles.values())}
        added = [AddedToken(token, rstrip=token in self.strips) for token in sorted(tokens)]
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        tokenizer.add_tokens([*self.plain])
        for role, token in roles.items():
            setattr(tokenizer, role, token)
        tokenizer.chat_template = self.template
        if self.adds_bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{self.bos} $A",
                pair=f"{self.bos} $A $B",
                special_tokens=[(self.bos, tokenizer.bos_token_id)],
            )
        return tokenizer

    def save(self, folder: Any, tiny: Any) -> None:
        """Write the checkpoint."""
        torch.manual_seed(0)
        tokenizer = self.tokenizer(tiny)
        config = self.config(
            **self.sizes,
            # A head that a frozen model's adapters can say something with.
            initializer_range=0.2,
            init_std=0.2,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config)
        stops = self.stops or (self.eos,)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([*stops])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama-3": Family(
        LlamaConfig,
        GATED,
        published("llama3"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        stops=("<|end_of_text|>", "<|eot_id|>"),
        end="<|eot_id|>",
    ),
    "qwen-2.5-base": Family(
        Qwen2Config,
        GATED,
        published("qwen2_5"),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        tokens=CHATML,
        end="<|im_end|>",
    ),
    "qwen-2.5-instruct": Family(
        Qwen2Config,
        GATED,
        published("qwen2_5"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        tokens=CHATML,
        stops=("<|im_end|>", "<|endoftext|>"),
        end="<|im_end|>",
    ),
    "qwen-3": Family(
        Qwen3Config,
        GATED | {"head_dim": 8},
        published("qwen3"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        tokens=CHATML,
        plain=("<think>", "</think>"),
        stops=("<|im_end|>", "<|endoftext|>"),
        end="<|im_end|>",
    ),
    "gemma-3": Family(
        Gemma3TextConfig,
        # Of its two layers one sees less than a text.
        GATED | {"head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2},
        published("gemma3"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        adds_bos=True,
        tokens=("<start_of_turn>", "<end_of_turn>"),
        stops=("<eos>", "<end_of_turn>"),
        end="<end_of_turn>",
    ),
    "phi-3": Family(
        Phi3Config,
        GATED | {"sliding_window": 16},
        published("phi3"),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        tokens=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        strips=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        end="<|end|>",
    ),
    "mixtral": Family(
        MixtralConfig,
        GATED | {"num_local_experts": 4},
        MIXTRAL,
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        end="</s>",
        unpacked={Sft: BALANCE, Align: BALANCE},
    ),
    "opt": Family(
        OPTConfig,
        SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        None,
        bos="</s>",
        eos="</s>",
        pad="<pad>",
        adds_bos=True,
    ),
    "gpt-2": Family(
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        None,
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        # TRL trains DPO without dropout.
        unpacked={Sft: DROPOUT},
    ),
}
NAMES = pytest.mark.parametrize("name", FAMILIES)


def opening_of(tokenizer, prompt):
    """What a user of transformers has generation start from."""
    if tokenizer.chat_template is None:
        return tokenizer(f"{prompt}\n\n", return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


@NAMES
def test_a_conversation_has_the_ids_of_its_template(name, tiny_tokenizer, tmp_path):
    family = FAMILIES[name]
    family.save(tmp_path, tiny_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    conversation = [
        {"role": "user", "content": "hello how are you"},
        {"role": "assistant", "content": "I am good"},
        {"role": "user", "content": "why"},
    ]
    answer = {"role": "assistant", "content": "because of the water"}
    prompts = [[Message(**turn) for turn in conversation], "why is it cold"]
    read = Formatter(tokenizer).tokenise(prompts, [answer["content"], "  so it is \n"])
    if family.template is None:
        openings = [
            "\n\nHuman: hello how are you\n\nAssistant: I am good\n\nHuman: why\n\nAssistant:",
            "why is it cold\n\n",
        ]
        wholes = [openings[0] + " because of the water", openings[1] + "  so it is \n"]
        openings = [tokenizer(text).input_ids for text in openings]
        wholes = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in wholes]
    else:
        render = partial(tokenizer.apply_chat_template, return_dict=False)
        asked = [conversation, [{"role": "user", "content": "why is it cold"}]]
        answers = [answer, {"role": "assistant", "content": "  so it is \n"}]
        openings = [render(turns, add_generation_prompt=True) for turns in asked]
        wholes = [render([*turns, last]) for turns, last in zip(asked, answers, strict=True)]
    assert [text.prompt_ids + text.response_ids for text in read] == wholes
    assert read[0].prompt_ids == openings[0]
    # White space before an answer may be a token with what the prompt ends with.
    assert read[1].prompt_ids == openings[1][: len(read[1].prompt_ids)]
    end = tokenizer.convert_tokens_to_ids(family.end or family.eos)
    assert all(end in text.response_ids for text in read)


@NAMES
def test_a_trained_model_stops_by_itself(name, tiny_tokenizer, tmp_path, command, capsys):
    family = FAMILIES[name]
    adapters = dict.fromkeys([Sft, Align], ())
    # Each of the two trains an adapter in half of the families.
    adapters[Sft if [*FAMILIES].index(name) % 2 else Align] = (*("--lora", "--lora-rank", 16),)
    start, sft, aligned = (tmp_path / part for part in ("start", "sft", "aligned"))
    family.save(start, tiny_tokenizer)
    rows = [row | {"chosen": "kind help"} for row in weighted(8)]
    data = write_lines(tmp_path / "weighted.jsonl", rows)
    flags = ("--data", data, "--batch-size", 8, "--gradient-accumulation", 1)
    flags += ("--dtype", "float32", "--threads", 1, "--warmup-steps", 0)
    for kind, model, output, steps, rate in (
        (Sft, start, sft, 30, 2e-2),
        (Align, sft, aligned, 2, 1e-3),
    ):
        speed = ("--max-steps", steps, "--learning-rate", rate)
        command(kind, "--model", model, "--output", output, *flags, *speed, *adapters[kind])
        said = capsys.readouterr().err
        reasons = [line for line in said.splitlines() if "read by itself, padded" in line]
        reason = family.unpacked.get(kind)
        assert reasons == ([f"each text is read by itself, padded: {reason}"] if reason else [])
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    model = AutoModelForCausalLM.from_pretrained(aligned)
    assert tokenizer.chat_template == family.template
    end = tokenizer.convert_tokens_to_ids(family.end or family.eos)
    for row in rows[:4]:
        opening = opening_of(tokenizer, row["prompt"])
        generated = model.generate(**opening, max_new_tokens=40, do_sample=False)[0]
        answer = generated[opening["input_ids"].shape[1] :].tolist()
        assert answer.index(end) == len(answer) - 1
        assert "kind help" in tokenizer.decode(answer)
