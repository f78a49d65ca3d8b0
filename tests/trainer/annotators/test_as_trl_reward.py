"""What TRL asks of its RewardTrainer, asked of training annotators with the objective bt."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.commands import TrainAnnotator

from ..samples import pairs, write_lines


@pytest.fixture
def flags(tmp_path):
    return (
        *("--output", tmp_path / "annotator", "--batch-size", 8, "--max-steps", 2),
        *("--learning-rate", 1e-2, "--max-length", 64, "--dtype", "float32", "--threads", 1),
        *("--validation-fraction", 0, "--held-out-fraction", 0),
    )


@pytest.fixture
def train(flags, tmp_path, command):
    """Trains on rows, and gives the model that is left."""

    def run(model, rows, *more, output="annotator"):
        data = write_lines(tmp_path / "pairs.jsonl", rows)
        more = (*more, "--output", tmp_path / output)
        command(TrainAnnotator, "--model", model, "--data", data, *flags, *more)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / output)

    return run


def moved(folder, trained):
    """The names of the weights that training has moved, and of those that it has not."""
    start = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    before = dict(start.named_parameters())
    # The head of the start is another random one.
    equal = {
        name: torch.equal(weight, before[name])
        for name, weight in trained.named_parameters()
        if not name.startswith("score")
    }
    return {name for name in equal if not equal[name]}, {name for name in equal if equal[name]}


def chat(role, text):
    return [{"role": role, "content": text}]


def preferences(count=16):
    """The pairs in TRL's columns."""
    for row in pairs(count):
        chosen, rejected = "ab" if row["preferred"] == "a" else "ba"
        yield row["prompt"], row[f"response_{chosen}"], row[f"response_{rejected}"]


@pytest.mark.parametrize("is_chat", [False, True])
def test_every_weight_moves(is_chat, train, tiny_causal):
    rows = [
        {
            "prompt": chat("user", prompt) if is_chat else prompt,
            "chosen": chat("assistant", chosen) if is_chat else chosen,
            "rejected": chat("assistant", rejected) if is_chat else rejected,
            "source": "a column that nothing reads",
        }
        for prompt, chosen, rejected in preferences()
    ]
    changed, kept = moved(tiny_causal, train(tiny_causal, rows))
    assert changed
    assert not kept


@pytest.mark.parametrize("is_chat", [False, True])
def test_texts_without_a_prompt_of_their_own_are_those_with_one(is_chat, train, tiny_causal):
    apart, whole = [], []
    for prompt, chosen, rejected in preferences():
        if is_chat:
            asked, good, bad = (
                chat("user", prompt),
                chat("assistant", chosen),
                chat("assistant", rejected),
            )
        else:
            asked, good, bad = f"\n\nHuman: {prompt}\n\nAssistant:", f" {chosen}", f" {rejected}"
        apart.append({"prompt": asked, "chosen": good, "rejected": bad})
        whole.append({"chosen": asked + good, "rejected": asked + bad})
    expected = train(tiny_causal, apart).state_dict()
    found = train(tiny_causal, whole, output="whole")
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_adapters_move_what_they_are_merged_into_alone(train, tiny_causal):
    changed, kept = moved(tiny_causal, train(tiny_causal, pairs(16), "--lora"))
    assert {name.rsplit(".", 2)[1] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all("norm" in name or "embed" in name for name in kept)


@pytest.fixture(params=["mixtral", "qwen-3"])
def experts(request, tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    small = dict(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts_per_tok=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = (
        MixtralForCausalLM(MixtralConfig(**small, num_local_experts=4))
        if request.param == "mixtral"
        else Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**small, num_experts=4, moe_intermediate_size=16, head_dim=8)
        )
    )
    model.save_pretrained(tmp_path / "experts")
    tiny_tokenizer.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--lora", "--lora-dropout", 0)])
def test_a_mixture_of_experts_can_be_an_annotator(more, experts, train, tmp_path):
    changed, kept = moved(experts, train(experts, pairs(16), *more))
    assert {name for name in changed if "experts" in name}
    assert all("norm" in name or "embed" in name for name in kept)
    assert bool(kept) == bool(more)
    found = Annotator.load(tmp_path / "annotator", dtype="float32").annotate(
        [Triplet(prompt="what about the cat", response_a="kind help", response_b="rude")]
    )
    assert found[0].preferred in ("a", "b", "tie")


def test_adapters_of_experts_have_no_dropout(experts, flags, tmp_path, failure):
    data = write_lines(tmp_path / "pairs.jsonl", pairs(16))
    message = failure(TrainAnnotator, "--model", experts, "--data", data, *flags, "--lora")
    assert message.endswith(
        "--lora-dropout 0.05: adapters of a mixture of experts have no dropout; give "
        "--lora-dropout 0"
    )


def test_a_reward_model_is_trained_further(train, tiny_annotator):
    trained = train(tiny_annotator, pairs(16))
    start = LlamaForSequenceClassification.from_pretrained(tiny_annotator)
    # Its head is the one that it had, two steps on.
    assert 0 < (trained.score.weight - start.score.weight).abs().max() < 0.1
    _, kept = moved(tiny_annotator, trained)
    assert not kept


def test_a_model_of_two_labels_is_refused(flags, failure, tiny_annotator, tmp_path):
    start = LlamaForSequenceClassification.from_pretrained(
        tiny_annotator, num_labels=2, ignore_mismatched_sizes=True
    )
    two = tmp_path / "two labels"
    start.save_pretrained(two)
    for file in tiny_annotator.glob("*token*"):
        (two / file.name).write_bytes(file.read_bytes())
    data = write_lines(tmp_path / "pairs.jsonl", pairs(16))
    message = failure(TrainAnnotator, "--model", two, "--data", data, *flags)
    assert "cannot be given a scalar head" in message


def test_the_template_is_kept(train, tiny_causal, tiny_tokenizer, tmp_path):
    train(tiny_causal, pairs(16))
    kept = tmp_path / "annotator" / "chat_template.jinja"
    assert kept.read_text() == tiny_tokenizer.chat_template


@pytest.mark.parametrize("margin", [0, 2])
def test_the_margin_is_taken_from_the_difference(margin, train, tiny_causal, tmp_path):
    train(tiny_causal, pairs(8), "--margin", margin)
    first = json.loads((tmp_path / "annotator" / "training.jsonl").read_text().splitlines()[0])
    # A new head tells responses apart by little.
    expected = torch.nn.functional.softplus(torch.tensor(float(margin))).item()
    assert first["loss"] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_attention_dropout_keeps_an_annotator_from_rows(probability, tiny_tokenizer):
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        num_labels=1,
        attn_pdrop=probability,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = GPT2ForSequenceClassification(config)
    scorer = ScalarHeadScorer(model, 0, PassBudget(None, "cpu"), bfloat16=False)
    assert scorer.shares_prompts == (probability == 0)
