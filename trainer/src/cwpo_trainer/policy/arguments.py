"""The arguments of TRL's trainers: our settings by TRL's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cwpo_trainer.plan.schedule import total_steps, warmup_steps
from cwpo_trainer.policy import sharding
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import CHECKPOINTS_NAME
from cwpo_trainer.settings.mixins import Evaluation
from cwpo_trainer.settings.policy_training import PolicyTraining

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged_adamw_32bit": "paged_adamw_32bit"}


def training_arguments(
    training: PolicyTraining, folder: Path, rows: int, *, loads_once: bool
) -> dict[str, Any]:
    """What SFTConfig and DPOConfig share, for a dataset of `rows` rows and an output folder.

    Args:
        loads_once: the first process alone loads the model; see `sharding.arguments`.
    """
    return dict(
        **sharding.arguments(
            training.sharding,
            checkpointing=training.gradient_checkpointing,
            loads_once=loads_once,
        ),
        output_dir=str(folder / CHECKPOINTS_NAME),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        optim=_OPTIMIZERS[training.optimizer],
        warmup_steps=warmup_steps(training.warmup_steps, total_steps(training, rows)),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=process.use_bfloat16(training.dtype),
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=training.seed,
        max_length=None,
        logging_steps=training.logging_steps,
        # With it a loss of NaN would be logged as the mean of the losses before.
        logging_nan_inf_filter=False,
        # The one before stays until the next is whole.
        save_total_limit=2,
        run_name=training.output.name,
        disable_tqdm=True,
    )


def evaluation_arguments(evaluation: Evaluation) -> dict[str, Any]:
    """When SFTConfig and DPOConfig are to evaluate, and what follows from it.

    What is best can only be kept if each evaluation is followed by a checkpoint; other checkpoints
    are those of `trl_training`.
    """
    when = "steps" if evaluation.eval_steps else "epoch"
    arguments = {
        "eval_strategy": when if evaluation.evaluates else "no",
        "eval_steps": evaluation.eval_steps,
        "save_strategy": when if evaluation.keep_best else "no",
        "save_steps": evaluation.eval_steps or 1,
        "load_best_model_at_end": evaluation.keep_best,
    }
    if evaluation.keep_best or evaluation.patience:
        arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    # Such as how many evaluations in a row brought no lower loss.
    return arguments | {"restore_callback_states_from_checkpoint": evaluation.patience is not None}
