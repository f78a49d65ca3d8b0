"""SFT on packed rows, against TRL's on padded batches."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from cwpo_trainer.policy.packed_sft import PackedSFTTrainer

from .test_confidence_dpo import assert_same_gradient

PROMPT = [*range(20, 40)]
TEXTS = [
    (PROMPT, [5, 6, 7]),
    (PROMPT, [5, 9]),
    ([50, 51], [*range(60, 90)]),
    (PROMPT, [5, 6, 7]),
    ([8], [100, 101, 102, 103]),
    ([33, 34], [3]),
]


def rows():
    return Dataset.from_list(
        [
            {
                "input_ids": prompt + response,
                "labels": [-100] * len(prompt) + response,
            }
            for prompt, response in TEXTS
        ]
    )


def build(kind, folder, model_folder, tokenizer, *, size=6, accumulation=1, **more):
    config = SFTConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        max_length=None,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    return kind(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=config,
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=copy.deepcopy(tokenizer),
        **more,
    )


def gradient_of(trainer):
    batch = trainer.data_collator([*trainer.train_dataset])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


def test_loss_and_gradient_are_trls(tiny_causal, tiny_tokenizer, tmp_path):
    ours = build(PackedSFTTrainer, tmp_path, tiny_causal, tiny_tokenizer)
    assert ours.unpacked_because is None
    theirs = build(SFTTrainer, tmp_path, tiny_causal, tiny_tokenizer)
    (loss, gradient), (expected, of_theirs) = gradient_of(ours), gradient_of(theirs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_gradient(gradient, of_theirs)


@pytest.mark.parametrize("shared", [True, False])
def test_training_evaluation_and_what_is_logged_are_trls(
    shared, tiny_causal, tiny_tokenizer, tmp_path
):
    ours = build(
        *(PackedSFTTrainer, tmp_path, tiny_causal, tiny_tokenizer),
        **dict(size=4, accumulation=2, share_prompts=shared),
    )
    assert (ours.unpacked_because is None) == shared
    theirs = build(SFTTrainer, tmp_path, tiny_causal, tiny_tokenizer)
    for trainer in (ours, theirs):
        trainer.train()
    for found, expected in zip(ours.state.log_history[:2], theirs.state.log_history, strict=False):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            if name == "loss" or shared:
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    one_batch = build(PackedSFTTrainer, tmp_path, tiny_causal, tiny_tokenizer, share_prompts=shared)
    assert one_batch.evaluate()["eval_loss"] == pytest.approx(
        build(SFTTrainer, tmp_path, tiny_causal, tiny_tokenizer).evaluate()["eval_loss"], rel=1e-5
    )
