"""The pretrained model that an annotator starts from, and the adapters that LoRA gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from cwpo.errors import ConfigError, first_line
from cwpo_annotator.backends.torch.loading import load_language_model
from cwpo_annotator.checkpoint import CheckpointError
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_trainer.lora import adding_adapters, lora_config
from cwpo_trainer.settings.mixins import LoraDropout


def load_with_scalar_head(base: Path, encoder: Encoder, *, layers: int | None = None) -> Any:
    """The base model with a new scalar head, in float32.

    Args:
        layers: how many of the backbone's layers to keep, from the input on; None keeps all.
    Raises: CheckpointError for one that cannot be loaded so; ConfigError for too many layers.
    """
    try:
        config = _config(base, layers, num_labels=1)
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{base}: cannot be given a scalar head: {reason}") from error
    _check_finite(model, base)
    if len(encoder.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(encoder.tokenizer))
    model.config.pad_token_id = encoder.pad_token_id
    return model


def load_causal(base: Path, *, layers: int | None = None) -> Any:
    """The base model as a causal language model, in float32.

    Args:
        layers: how many of the backbone's layers to keep, from the input on; None keeps all.
    Raises: CheckpointError for one that is none; ConfigError for too many layers.
    """
    config = _config(base, layers)
    model = load_language_model(base, torch.float32, config)
    _check_finite(model, base)
    return model


def outline(base: Path, *, scalar_head: bool, layers: int | None = None) -> Any:
    """The model that either of the above loads, without memory for its weights.

    Raises: as they do, for what config.json tells.
    """
    kind = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
    try:
        config = _config(base, layers, **({"num_labels": 1} if scalar_head else {}))
        with torch.device("meta"):
            return kind.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{base}: cannot become an annotator: {first_line(error)}") from error


def add_lora(model: Any, lora: LoraDropout) -> None:
    """With --lora, freeze the backbone and give its linear layers low-rank adapters.

    A scalar head, which is new, trains whole; a language model's head is frozen too.
    Raises: ConfigError for a dropout that the adapters cannot have.
    """
    config = lora_config(lora, model.base_model, dropout=lora.lora_dropout)
    if config is None:
        return
    language_head = model.get_output_embeddings()
    if language_head is not None:
        language_head.requires_grad_(False)
    with adding_adapters(lora.lora_dropout):
        adapted = get_peft_model(model.base_model, config)
    setattr(model, model.base_model_prefix, adapted)


def checkpoint_activations(model: Any) -> None:
    """Have each layer compute its activations again in the backward pass.

    Raises: ConfigError for a model whose layers cannot.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"--gradient-checkpointing: the layers of {model.config.model_type} do not have it; "
            "leave the flag out, or lower --token-budget"
        ) from error


def merge_lora(model: Any) -> None:
    """Make the model a plain one again, any adapters added into the backbone."""
    if isinstance(model.base_model, PeftModel):
        setattr(model, model.base_model_prefix, model.base_model.merge_and_unload())


def _check_finite(model: Any, base: Path) -> None:
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise CheckpointError(
                f"{base}: {name} contains NaN or infinite weights: download or export it again"
            )


def _config(base: Path, layers: int | None, **more: Any) -> Any:
    config = AutoConfig.from_pretrained(base, trust_remote_code=False, **more)
    if layers is not None:
        _keep_layers(config, layers)
    return config


def _keep_layers(config: Any, layers: int) -> None:
    if layers > config.num_hidden_layers:
        raise ConfigError(f"--layers {layers}: the model has {config.num_hidden_layers} layers")
    config.num_hidden_layers = layers
    # Models that mix kinds of attention name the kind of each layer.
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
