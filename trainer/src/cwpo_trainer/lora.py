"""LoRA: low-rank adapters, in annotators and in the strong model alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from cwpo.errors import ConfigError
from cwpo_trainer.settings.mixins import Lora

ALL_LINEAR = ("all-linear",)
"""--lora-targets: all linear layers but the head."""


def lora_config(
    lora: Lora, model: Any, *, dropout: float, task: str | None = None
) -> LoraConfig | None:
    """LoRA on the linear layers of --lora-targets, never on the head; None without --lora.

    Args:
        model: what the adapter is for.
        dropout: probability on the adapters' input.
        task: PEFT's name for what the model does; None for a backbone, which does nothing yet.
    Raises: ConfigError for a target that is no linear layer of the model.
    """
    if not lora.lora:
        return None
    return LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=dropout,
        target_modules=_targets(lora.lora_targets, model),
        task_type=task,
    )


@contextmanager
def adding_adapters(dropout: float) -> Iterator[None]:
    """Inside the block, PEFT gives a model adapters with this dropout.

    Raises: ConfigError where it gives some to the experts of a mixture, which it does without only.
    """
    try:
        yield
    except ValueError as error:
        if "lora_dropout" not in str(error):
            raise
        raise ConfigError(
            f"--lora-dropout {dropout:g}: adapters of a mixture of experts have no dropout; give "
            "--lora-dropout 0"
        ) from error


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether the linear layer of this name gets adapters by --lora-targets, as PEFT finds it."""
    return (*targets,) == ALL_LINEAR or any(f".{name}".endswith(f".{target}") for target in targets)


def _targets(names: list[str], model: Any) -> str | list[str]:
    if (*names,) == ALL_LINEAR:
        return ALL_LINEAR[0]
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    for target in names:
        if not any(is_target(name, [target]) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"--lora-targets {target}: no linear layer has this name; the model has {known}"
            )
    return names
