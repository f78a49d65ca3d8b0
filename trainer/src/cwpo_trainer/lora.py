"""LoRA: low-rank adapters, in annotators and in the strong model alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig

from cwpo.errors import ConfigError
from cwpo_trainer.settings.mixins import Lora


def lora_config(lora: Lora, *, dropout: float, task: str | None = None) -> LoraConfig | None:
    """LoRA on all linear layers but the head; None without --lora.

    Args:
        dropout: probability on the adapters' input.
        task: PEFT's name for what the model does; None for a backbone, which does nothing yet.
    """
    if not lora.lora:
        return None
    return LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
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
