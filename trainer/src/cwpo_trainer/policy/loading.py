"""Loading the strong model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from cwpo.errors import first_line
from cwpo_annotator.checkpoint import CheckpointError, base_folder, is_adapter, resolve
from cwpo_trainer.policy.adapters import merge, with_adapter


def load(
    folder: Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    quantisation: Any = None,
    attention: str | None = None,
    weights: bool = True,
) -> Any:
    """A causal language model, from safetensors and without code of its own.

    In one that is an adapter, the base model has the adapter's layers beside its own, unmerged.

    Args:
        attention: its implementation, as transformers names it; None leaves it to transformers.
        weights: load them; otherwise they are whatever memory holds, unless it is an adapter.
    Raises: CheckpointError for a folder that holds none.
    """
    if is_adapter(folder):
        base = load(
            base_folder(folder), dtype=dtype, quantisation=quantisation, attention=attention
        )
        return with_adapter(base, folder).get_base_model()
    if not weights:
        return _without_weights(folder, dtype, attention)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantisation,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: not a causal language model: {first_line(error)}"
        ) from error


def _without_weights(folder: Path, dtype: torch.dtype | str, attention: str | None) -> Any:
    """The model with all that is not loaded from its checkpoint, such as rotary frequencies.

    Nothing is written to its weights, which therefore take no memory on a CPU.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    model.generation_config = generation_config(folder, config)
    return model


def generation_config(folder: Path, config: Any) -> GenerationConfig:
    """As transformers makes it for the model in this folder, whose configuration is `config`."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_model_config(config)


def can_load_once(model: str) -> bool:
    """Whether one process can hand the model to the others: all of its checkpoint is parameters.

    Args:
        model: folder or Hub id.
    """
    folder = resolve(model)
    if is_adapter(folder):
        return False
    found = _without_weights(folder, torch.float32, None)
    return {*found.state_dict()} == {
        name for name, _ in found.named_parameters(remove_duplicate=False)
    }


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding with a token of its own or else with EOS.

    An adapter without one has that of its base model.

    Raises: CheckpointError where there is none, or it has no EOS to end a response with.
    """
    has_own = (folder / "tokenizer_config.json").is_file()
    place = folder if has_own else base_folder(folder, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{place}: the tokenizer cannot be loaded: {first_line(error)}"
        ) from error
    if tokenizer.eos_token is None:
        raise CheckpointError(f"{folder}: the tokenizer has no EOS to end a response with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_for_training(
    model: str,
    *,
    is_frozen: bool,
    bfloat16: bool,
    in_4bit: bool = False,
    adapter_dropout: float | None = None,
    attention: str | None = None,
    weights: bool = True,
) -> Any:
    """A model to train, or to hold beside it.

    Args:
        model: folder or Hub id.
        is_frozen: adapters alone are trained, so that the weights may be stored in what they are
            computed in; weights that are trained are float32.
        bfloat16: whether training computes in it.
        in_4bit: quantise the linear layers to 4 bits (NF4).
        adapter_dropout: if the model is an adapter and all else is frozen, train it further, with
            this dropout; None holds it frozen. Where all weights are trained, it is merged.
        attention: its implementation, as transformers names it.
        weights: load them, or leave them to the process that does; see `load`.
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
    folder = resolve(model)
    loaded = load(
        base_folder(folder),
        dtype=dtype,
        quantisation=quantisation,
        attention=attention,
        weights=weights,
    )
    if is_adapter(folder):
        dropout = adapter_dropout if is_frozen else None
        adapted = with_adapter(loaded, folder, dropout=dropout)
        if not is_frozen:
            loaded = merge(adapted, dtype).model.requires_grad_()
        else:
            loaded = adapted if dropout is not None else adapted.get_base_model()
    _keep_weights_differentiable(loaded)
    return loaded


def load_reference(
    model: str,
    *,
    bfloat16: bool,
    is_sharded: bool,
    attention: str | None = None,
    weights: bool = True,
) -> Any:
    """A model to hold beside a policy all of whose weights are trained, in float32.

    Where training computes in bfloat16, the weights that are only read in it are held in it. What
    the model computes is what the policy, at the start, computes.

    Args:
        model: folder or Hub id.
        bfloat16: whether training computes in it.
        is_sharded: FSDP2 and ZeRO-3 compute with all weights in bfloat16; autocast does so with
            those of linear layers.
        attention: its implementation, as transformers names it.
        weights: load them, or leave them to the process that does; see `load`.
    """
    folder = resolve(model)
    if not bfloat16 or is_adapter(folder):
        loaded = load_for_training(
            model, is_frozen=False, bfloat16=bfloat16, attention=attention, weights=weights
        )
    else:
        stored = torch.bfloat16 if is_sharded else "auto"
        loaded = load(folder, dtype=stored, attention=attention, weights=weights)
    if bfloat16:
        _hold_in_bfloat16(loaded, is_sharded=is_sharded)
    return loaded


def _hold_in_bfloat16(model: Any, *, is_sharded: bool) -> None:
    others = [each for each in model.modules() if not isinstance(each, nn.Linear)]
    # Those of a head that is tied to the embedding among them.
    elsewhere = {id(weight) for each in others for weight in each.parameters(recurse=False)}
    for weight in model.parameters():
        in_float32 = id(weight) in elsewhere and not is_sharded
        weight.data = weight.data.to(torch.float32 if in_float32 else torch.bfloat16)


def _keep_weights_differentiable(model: Any) -> None:
    """Keep 4-bit layers on a CPU from a layout for inference alone.

    bitsandbytes takes it up in the first evaluation, and what is trained after it gets no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
