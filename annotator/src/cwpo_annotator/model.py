"""The sequence-classification model of a checkpoint, with all its weights from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification

from cwpo_annotator import checkpoint
from cwpo_annotator.checkpoint import CheckpointError

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."


def load_model(folder: Path, *, dtype: torch.dtype, pad_token_id: int) -> Any:
    """The model in evaluation mode on the CPU; a PEFT adapter is merged into its base model.

    A pad token that the tokenizer has and the model does not gets an embedding: padding alone
    reads it, and nothing attends to padding.
    Raises: CheckpointError for weights that cannot be loaded, or of which some are missing.
    """
    checkpoint.check(folder)
    try:
        read = _with_adapter if checkpoint.is_adapter(folder) else _plain
        model = read(folder, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {reason}") from error
    if pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
    model.config.pad_token_id = pad_token_id
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
    model, missing = _read(checkpoint.base(folder), torch.float32)
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
            "random ones would score at random; train them with `cwpo train-annotator`"
        )
