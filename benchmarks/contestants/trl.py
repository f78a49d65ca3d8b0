"""TRL's trainers of preferences and reward models, and a step of theirs at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from training_material import LEARNING_RATE, causal, lora, pairs_of, response_encoder, scalar
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.run import process

# Does one step on a batch of pairs; its loss.
Step = Callable[[Sequence[EncodedPair]], float]


def dpo_step(
    settings: argparse.Namespace,
    folder: Path,
    trainer: type[DPOTrainer] | None = None,
    config: type[DPOConfig] = DPOConfig,
) -> Step:
    """A step of DPO by TRL's trainer or one like it: forward, backward and optimiser."""
    options: dict[str, Any] = dict(
        output_dir=str(folder / config.__name__),
        per_device_train_batch_size=settings.batch_size,
        beta=0.5,
        max_length=None,
        learning_rate=LEARNING_RATE,
        bf16=process.use_bfloat16(settings.dtype),
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    arguments: dict[str, Any] = dict(
        model=causal(),
        ref_model=causal() if settings.full else None,
        train_dataset=dpo_rows(pairs_of(response_encoder(), 2, settings.max_length)),
        processing_class=response_encoder().tokenizer,
        peft_config=None if settings.full else lora(),
    )
    trainer = trainer or PretokenisedDPOTrainer
    return step_of(trainer(args=config(**options), **arguments), dpo_rows)


class PretokenisedDPOTrainer(DPOTrainer):
    """TRL's own, on the tokens that the other contestant reads."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def dpo_rows(pairs: Sequence[EncodedPair]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt_ids": list(pair.a[: pair.start]),
                "chosen_ids": list(pair.a[pair.start :]),
                "rejected_ids": list(pair.b[pair.start :]),
                # Then the loss has to be that of TRL.
                "confidence": 1.0,
            }
            for pair in pairs
        ]
    )


def reward_step(settings: argparse.Namespace, folder: Path) -> Step:
    """What TRL's RewardTrainer does in a step."""
    model, encoder = scalar()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(folder / "reward"),
            per_device_train_batch_size=settings.batch_size,
            learning_rate=LEARNING_RATE,
            max_length=None,
            bf16=process.use_bfloat16(settings.dtype),
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=reward_rows(pairs_of(encoder, 2, settings.max_length)),
        processing_class=encoder.tokenizer,
    )
    return step_of(trainer, reward_rows)


def reward_rows(pairs: Sequence[EncodedPair]) -> Dataset:
    return Dataset.from_list(
        [{"chosen_ids": list(pair.a), "rejected_ids": list(pair.b)} for pair in pairs]
    )


def step_of(trainer: Any, rows: Callable[[Sequence[EncodedPair]], Dataset]) -> Step:
    """One step of a TRL trainer, outside its own loop so that contestants can take turns."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(batch: Sequence[EncodedPair]) -> float:
        inputs = trainer.data_collator(list(rows(batch)))
        loss = trainer.training_step(model, inputs)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
