"""Policies that read packed rows: exact in every setting, or not used."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from cwpo_trainer import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.losses import OF_TRL_TYPE
from cwpo_trainer.policy.packed_model import read_packed

from .test_confidence_dpo import (
    assert_same_gradient,
    batch_of,
    build,
    dataset,
    gradients,
    moved,
    options,
)

SMALL = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
GATED = SMALL | dict(intermediate_size=48, num_key_value_heads=2)


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def two(folder, model_folder, tokenizer, *, adapters=None, **overrides):
    """The gradients of a trainer that shares prompts, and of one that does not."""
    found = []
    for shared in (True, False):
        config = ConfidenceDPOConfig(**options(folder, **overrides), share_prompts=shared)
        trainer = build(
            ConfidenceDPOTrainer, config, folder, model_folder, tokenizer, dataset(), lora=adapters
        )
        assert (trainer.unpacked_because is None) == shared
        if adapters is not None:
            draw = torch.Generator().manual_seed(2)
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=draw)
                    parameter.data.add_(noise, alpha=0.05)
        if overrides.get("gradient_checkpointing"):
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(trainer, batch_of(trainer)))
    return found


@pytest.mark.parametrize("loss", OF_TRL_TYPE)
def test_all_losses_have_the_gradient_of_unshared_prompts(
    loss, tiny_causal, tiny_tokenizer, tmp_path
):
    extra = {"label_smoothing": 0.2} if loss in ("robust", "cdpo") else {}
    packed, padded = two(tmp_path, tiny_causal, tiny_tokenizer, loss_type=loss, **extra)
    assert packed[0].item() == pytest.approx(padded[0].item(), rel=1e-5)
    assert_same_gradient(packed[1], padded[1])


@pytest.mark.parametrize(
    ("adapters", "overrides"),
    [
        (lora(), {}),
        (None, {"gradient_checkpointing": True}),
        (lora(), {"gradient_checkpointing": True}),
        (lora(), {"precompute_ref_log_probs": True}),
    ],
)
def test_ways_of_training_have_the_gradient_of_unshared_prompts(
    adapters, overrides, tiny_causal, tiny_tokenizer, tmp_path
):
    packed, padded = two(tmp_path, tiny_causal, tiny_tokenizer, adapters=adapters, **overrides)
    assert_same_gradient(packed[1], padded[1])


@pytest.mark.parametrize("shared", [True, False])
def test_pairs_of_uneven_batches_count_alike(shared, tiny_causal, tiny_tokenizer, tmp_path):
    after = []
    for size, accumulation in ((6, 1), (4, 2)):
        config = ConfidenceDPOConfig(
            **options(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                max_steps=2,
                optim="sgd",
                learning_rate=0.5,
                train_sampling_strategy="sequential",
            ),
            share_prompts=shared,
        )
        data = dataset().select(range(6))
        trainer = build(
            ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, data, shifted=False
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        after.append({name: p.detach() for name, p in trainer.model.named_parameters()})
        assert moved(before, after[-1])
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_batch_of_several_rows_is_that_of_one(tiny_causal, tiny_tokenizer, tmp_path, monkeypatch):
    steps = {}
    for tokens in (32, 1024):
        monkeypatch.setattr("cwpo_trainer.policy.row_training.row_tokens", lambda _, n=tokens: n)
        config = ConfidenceDPOConfig(**options(tmp_path))
        trainer = build(
            ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, dataset()
        )
        inputs = batch_of(trainer)
        trainer.create_optimizer()
        loss = trainer.training_step(trainer.model, inputs)
        logged = {}
        trainer.log(logged)
        gradient = {name: p.grad for name, p in trainer.model.named_parameters()}
        steps[len(inputs["packed_rows"])] = loss.item(), gradient, logged
    assert min(steps) == 1
    assert max(steps) > 2
    (one, of_one, logged), (several, of_several, also) = (steps[n] for n in sorted(steps))
    assert several == pytest.approx(one, rel=1e-5)
    assert_same_gradient(of_several, of_one)
    assert also == pytest.approx(logged, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**GATED)),
        OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)),
    ],
    ids=["llama", "opt"],
)
def test_a_model_that_reads_rows_generates_as_before(model):
    model.eval()
    asked = dict(
        inputs=torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        max_new_tokens=8,
        do_sample=False,
    )
    before = model.generate(**asked)
    assert read_packed(model, bfloat16=False) is None
    assert torch.equal(model.generate(**asked), before)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            GraniteForCausalLM(GraniteConfig(**GATED, logits_scaling=8.0)),
            "its log-probabilities would be others",
        ),
        (
            Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8)),
            "its hidden states would be others",
        ),
        (
            LlamaForCausalLM(LlamaConfig(**GATED, attention_dropout=0.1)),
            "its attention has dropout",
        ),
        (
            # Which calls it attn_pdrop.
            GPT2LMHeadModel(GPT2Config(**SMALL)),
            "its attention has dropout",
        ),
    ],
    ids=["logits scaled", "logits capped", "dropout", "dropout by another name"],
)
def test_a_model_that_would_compute_something_else_stays_as_it_is(model, reason):
    before = model.config._attn_implementation, copy.copy(model.forward)
    assert read_packed(model, bfloat16=False) == reason
    assert (model.config._attn_implementation, model.forward) == before


def test_dropout_that_is_switched_off_is_none():
    model = GPT2LMHeadModel(GPT2Config(**SMALL)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    state = torch.get_rng_state()
    assert read_packed(model, bfloat16=False) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("adapters", [False, True])
def test_logits_of_a_whole_batch_never_exist(adapters, tiny_tokenizer, tmp_path):
    vocabulary = 1 << 16
    folder = tmp_path / "many words"
    LlamaForCausalLM(
        LlamaConfig(**GATED | dict(vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1))
    ).save_pretrained(folder)
    data = dataset(prompt=["what about the water " * 20] * 8, chosen=["kind good help " * 20] * 8)
    config = ConfidenceDPOConfig(**options(tmp_path))
    trainer = build(
        ConfidenceDPOTrainer,
        config,
        tmp_path,
        folder,
        tiny_tokenizer,
        data,
        lora=lora() if adapters else None,
    )
    batch = batch_of(trainer, [0, 1])
    scored = int(batch["completion_mask"].sum())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        gradients(trainer, batch)
    events = measured.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest < scored * vocabulary * 2


def test_adapters_before_the_prompt_are_read_as_before(tiny_causal):
    from peft import PromptTuningConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert read_packed(model, bfloat16=False) == "its adapters are tokens before the prompt"


def test_a_model_that_is_read_padded_trains_and_says_why(tiny_tokenizer, tmp_path, capsys):
    folder = tmp_path / "dropout"
    config = LlamaConfig(**GATED | dict(vocab_size=len(tiny_tokenizer)), attention_dropout=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)
    arguments = ConfidenceDPOConfig(**options(tmp_path, max_steps=1))
    trainer = build(ConfidenceDPOTrainer, arguments, tmp_path, folder, tiny_tokenizer, dataset())
    assert trainer.unpacked_because == "its attention has dropout"
    assert "each text is read by itself, padded: its attention has dropout" in (
        capsys.readouterr().err
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert moved(before, dict(trainer.model.named_parameters()))
