"""TRL's trainers of preferences and reward models, and a step of theirs at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from training_material import LEARNING_RATE, causal, lora, response_encoder, scalar
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.policy.row_training import ROWS
from cwpo_trainer.run import process

# A trainer wants a dataset at its start; its steps are on batches of other pairs.
_PLACEHOLDER = [EncodedPair([1, 2, 3], [1, 2, 4], start=2)]


@dataclass(frozen=True, slots=True)
class Contestant:
    """Trains on batches of pairs.

    step: does one step on a batch, and gives its loss; tokens: that one forward pass over a batch
    reads, padding included.
    """

    step: Callable[[Sequence[EncodedPair]], float]
    tokens: Callable[[Sequence[EncodedPair]], int]


def dpo(
    settings: argparse.Namespace,
    folder: Path,
    trainer: type[DPOTrainer] | None = None,
    config: type[DPOConfig] = DPOConfig,
) -> Contestant:
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
        train_dataset=dpo_rows(_PLACEHOLDER),
        processing_class=response_encoder().tokenizer,
        peft_config=None if settings.full else lora(),
    )
    trainer = trainer or PretokenisedDPOTrainer
    return contestant(trainer(args=config(**options), **arguments), dpo_rows)


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


def reward(settings: argparse.Namespace, folder: Path) -> Contestant:
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
        train_dataset=reward_rows(_PLACEHOLDER),
        processing_class=encoder.tokenizer,
    )
    return contestant(trainer, reward_rows)


def reward_rows(pairs: Sequence[EncodedPair]) -> Dataset:
    return Dataset.from_list(
        [{"chosen_ids": list(pair.a), "rejected_ids": list(pair.b)} for pair in pairs]
    )


def contestant(trainer: Any, rows: Callable[[Sequence[EncodedPair]], Dataset]) -> Contestant:
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

    def tokens(batch: Sequence[EncodedPair]) -> int:
        inputs = trainer.data_collator(list(rows(batch)))
        if ROWS in inputs:
            return sum(len(packed.row.ids) for packed in inputs[ROWS])
        return inputs["input_ids"].numel()

    return Contestant(step, tokens)
