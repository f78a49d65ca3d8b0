"""Loads the models of checkpoints, in evaluation mode, with all weights from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.utils import logging as transformers_logging

from cwpo.errors import first_line
from cwpo_annotator import checkpoint
from cwpo_annotator.checkpoint import CheckpointError

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' progress bars and reports of missing weights.

    Missing weights are either expected, or reported by an error of our own.
    """
    control: Any = transformers_logging
    had_bars, verbosity = control.is_progress_bar_enabled(), control.get_verbosity()
    control.disable_progress_bar()
    control.set_verbosity_error()
    try:
        yield
    finally:
        control.set_verbosity(verbosity)
        if had_bars:
            control.enable_progress_bar()


def load_classifier(folder: Path, *, dtype: torch.dtype, pad_token_id: int) -> Any:
    """A sequence-classification model with one output, on the CPU.

    A PEFT adapter is merged into its base model. If the tokenizer's pad token is new to the model,
    an embedding is added for it; its value does not matter, since nothing attends to padding.
    Raises: CheckpointError if weights are missing or cannot be loaded.
    """
    checkpoint.check(folder)
    try:
        read = _with_adapter if checkpoint.is_adapter(folder) else _plain
        with quiet():
            model = read(folder, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {reason}") from error
    if pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
    model.config.pad_token_id = pad_token_id
    return model.eval()


def keep_head_in_float32(model: torch.nn.Module) -> None:
    """Have a scalar head compute in float32, whatever the backbone and any autocast compute in.

    A bfloat16 score has eight bits, too few to tell close responses apart.
    """
    for head in scalar_heads(model):
        head.float().forward = partial(_linear_in_float32, head)


def scalar_heads(model: torch.nn.Module) -> list[Any]:
    """The linear layers with one output."""
    linears = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return [linear for linear in linears if linear.out_features == 1]


def _linear_in_float32(head: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        return F.linear(inputs.float(), head.weight, head.bias)


def load_language_model(
    folder: Path, dtype: torch.dtype, config: PreTrainedConfig | None = None
) -> Any:
    """A causal language model on the CPU.

    Args:
        config: replaces the configuration in the folder; None uses that.
    Raises: CheckpointError if the folder holds no causal language model.
    """
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{folder}: not a causal language model: {reason}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(f"{folder}: not a causal language model: {missing[0]} is missing")
    _check_causal(model.eval(), folder)
    return model


def load_encoder_decoder(folder: Path, dtype: torch.dtype) -> Any:
    """An encoder-decoder language model on the CPU.

    Raises: CheckpointError if weights are missing or cannot be loaded.
    """
    try:
        with quiet():
            loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {reason}") from error
    model, report = loaded
    _refuse_missing(folder, set(report["missing_keys"]))
    return model.eval()


def _plain(folder: Path, dtype: torch.dtype) -> Any:
    model, missing = _read(folder, dtype)
    _refuse_missing(folder, missing)
    return model


def _with_adapter(folder: Path, dtype: torch.dtype) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: a PEFT adapter; `pip install peft`, or merge it into its base model with "
            "merge_and_unload and save that"
        ) from error
    # In float32: the sum of two rounded matrices would be rounded once more.
    model, missing = _read(checkpoint.base_folder(folder), torch.float32)
    with safe_open(folder / _ADAPTER_WEIGHTS, "pt") as weights:
        own = {name.removeprefix(_ADAPTER_PREFIX) for name in weights.keys()}  # noqa: SIM118
    _refuse_missing(folder, missing - own)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    # The weights only: positions are computed from buffers that stay in float32.
    for weight in merged.parameters():
        weight.data = weight.data.to(dtype)
    return merged


def _read(folder: Path, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The model, and the names of the weights that the folder does not have."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=1,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return model, set(info["missing_keys"])


def _refuse_missing(folder: Path, names: set[str]) -> None:
    if names:
        raise CheckpointError(
            f"{folder}: the checkpoint has no weights for {', '.join(sorted(names)[:3])}, and "
            "scores from random weights mean nothing; train them with `cwpo train-annotator`"
        )


@torch.inference_mode()
def _check_causal(model: Any, folder: Path) -> None:
    ids = torch.arange(3, 11)[None]
    other = ids.clone()
    other[0, -1] += 1
    logits = model(input_ids=ids).logits.float()
    earlier = model(input_ids=other).logits.float()[:, :-1]
    head = model.get_output_embeddings()
    own = head(model.base_model(input_ids=ids).last_hidden_state).float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if (logits[:, :-1] - earlier).norm() > tolerance * logits.norm():
        raise CheckpointError(f"{folder}: not a causal language model: tokens attend to later ones")
    if (logits - own).norm() > tolerance * logits.norm():
        raise CheckpointError(
            f"{folder}: its logits are scaled or capped after its last layer, which is not "
            "supported here; train with --objective bt"
        )
