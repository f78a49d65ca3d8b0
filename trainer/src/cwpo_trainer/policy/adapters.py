"""Policies that are LoRA adapters, in PEFT's format: read, trained further, merged and written.

A merged model is rounded to the number format of its base model. In bfloat16, steps that change a
weight by less than a 500th of it are lost then; an adapter keeps them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from cwpo.errors import ConfigError
from cwpo_annotator.checkpoint import CheckpointError, base_name, is_adapter, resolve
from cwpo_trainer.lora import adding_adapters, lora_config
from cwpo_trainer.settings.mixins import Lora
from cwpo_trainer.settings.policy_training import PolicyTraining
from cwpo_trainer.settings.unused_flags import flag

T = TypeVar("T", bound=PolicyTraining)


class Merged(NamedTuple):
    """A model with its adapter merged, in float32, and what its cast to another format will lose.

    lost: the norm of the difference that the cast makes, over the norm of the adapter's update.
    """

    model: Any
    lost: float


def going_on(training: T, start: Path) -> T:
    """The settings of a run; of one that trains an adapter further, with its rank, alpha, targets.

    Args:
        start: folder of the model to start from.
    Raises: ConfigError for one of these that was asked for and is another.
    """
    if not (training.lora and is_adapter(start)):
        return training
    config = read_config(start)
    modules = config.target_modules or []
    own: dict[str, Any] = {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_targets": [modules] if isinstance(modules, str) else sorted(modules),
    }
    for name, value in own.items():
        asked = getattr(training, name)
        if isinstance(asked, list):
            asked = sorted(asked)
        if name in training.model_fields_set and asked != value:
            raise ConfigError(
                f"{flag(name)} {asked}: the adapter {training.model}, which is trained further, "
                f"has {value}; leave {flag(name)} out"
            )
    return training.model_copy(update=own)


def read_config(folder: Path) -> LoraConfig:
    """The configuration of an adapter.

    Raises: CheckpointError for what is not LoRA, and for weights that are not in safetensors.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise CheckpointError(
            f"{folder}: an adapter of type {kind}; policies can be LoRA ones only"
        )
    return config


def with_adapter(model: Any, folder: Path, *, dropout: float | None = None) -> PeftModel:
    """The adapter in a folder on its base model.

    Args:
        dropout: of an adapter to train further; None for one that is read only.
    Raises: CheckpointError for an adapter that cannot be read; ConfigError for one without dropout.
    """
    config = read_config(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{folder}: the adapter has no {SAFETENSORS_WEIGHTS_NAME}")
    if dropout is not None:
        config.lora_dropout = dropout
    with adding_adapters(config.lora_dropout):
        return PeftModel.from_pretrained(
            model, str(folder), config=config, is_trainable=dropout is not None, torch_device="cpu"
        )


def new_adapter(policy: Any, lora: Lora, *, dropout: float) -> LoraConfig | None:
    """The adapter to add to a policy for training; None where it has one, or without --lora."""
    if isinstance(policy, PeftModel):
        return None
    return lora_config(lora, policy, dropout=dropout, task="CAUSAL_LM")


def merge(model: PeftModel, stored: torch.dtype) -> Merged:
    """Merge the adapter of a model in float32.

    Args:
        stored: number format that the merged weights are to be cast to.
    """
    update = lost = 0.0
    layers: list[Any] = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        before = _adapted(layer).clone()
        layer.merge()
        after = _adapted(layer)
        update += float((after - before).norm()) ** 2
        lost += float((after - after.to(stored)).norm()) ** 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = model.merge_and_unload()
    return Merged(merged, (lost / update) ** 0.5 if update else 0.0)


def _adapted(layer: Any) -> torch.Tensor:
    """The weight that the adapter of a layer changes; experts keep several in one module."""
    weight: torch.Tensor = getattr(
        layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    )
    return weight.detach()


def name_base(folder: Path, start: str) -> None:
    """Have the adapter in a folder name its base model: the start model, or the base of that.

    A folder is named by its absolute path, and a model of the Hub by its id rather than by the
    folder that it was downloaded to.

    Args:
        start: folder or Hub id of the model that training started from.
    """
    here = resolve(start)
    name = str(here.resolve()) if Path(start).is_dir() else start
    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = base_name(here) if is_adapter(here) else name
    config.save_pretrained(str(folder))
