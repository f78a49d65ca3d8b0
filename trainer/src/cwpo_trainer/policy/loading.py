"""Loading the strong model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from cwpo.errors import first_line
from cwpo_annotator.checkpoint import CheckpointError, resolve


def load(
    folder: Path, *, dtype: torch.dtype | str = torch.float32, quantisation: Any = None
) -> Any:
    """A causal language model, from safetensors and without code of its own.

    Raises: CheckpointError for a folder that holds none.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantisation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: not a causal language model: {first_line(error)}"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding with a token of its own or else with EOS.

    Raises: CheckpointError where there is none, or it has no EOS to end a response with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded: {first_line(error)}"
        ) from error
    if tokenizer.eos_token is None:
        raise CheckpointError(f"{folder}: the tokenizer has no EOS to end a response with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_for_training(model: str, *, is_frozen: bool, bfloat16: bool, in_4bit: bool = False) -> Any:
    """A model to train, or to hold beside it.

    Args:
        model: folder or Hub id.
        is_frozen: adapters alone are trained, so that the weights may be stored in what they are
            computed in; weights that are trained are float32.
        bfloat16: whether training computes in it.
        in_4bit: quantise the linear layers to 4 bits (NF4).
    """
    dtype = torch.bfloat16 if is_frozen and bfloat16 else torch.float32
    quantisation = None
    if in_4bit:
        quantisation = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    loaded = load(resolve(model), dtype=dtype, quantisation=quantisation)
    _keep_weights_differentiable(loaded)
    return loaded


def _keep_weights_differentiable(model: Any) -> None:
    """Keep 4-bit layers on a CPU from a layout for inference alone.

    bitsandbytes takes it up in the first evaluation, and what is trained after it gets no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
