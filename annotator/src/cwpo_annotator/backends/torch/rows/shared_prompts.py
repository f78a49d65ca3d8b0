"""Decoders that read packed rows, in which responses share one copy of their prompt.

What makes a model read rows, or read them faster, is tried on short texts first: a model whose
hidden states would not stay the same is left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from cwpo.errors import first_line
from cwpo_annotator.backends.torch.hardware.device import integers
from cwpo_annotator.backends.torch.rows.attention import IMPLEMENTATIONS, AttentionDropoutError
from cwpo_annotator.backends.torch.rows.layout import reading
from cwpo_annotator.backends.torch.rows.packing import pack_texts
from cwpo_annotator.backends.torch.rows.row import Row

logger = logging.getLogger("cwpo_annotator")

# Prompts that a model is tried on, their tokens, and those of the two texts that begin with them.
_PROBES, _SHARED, _OWN = 8, 20, (4, 7)


def read_row(model: Any, row: Row, *, handed_down: bool = False) -> torch.Tensor:
    """Hidden states of a packed row, shape (tokens, width), from a model after `share_prompts`.

    Args:
        handed_down: the model is to hand the row's layout down to its attention, for a backward
            pass that computes activations again.
    Raises: LookupError if it does not.
    """
    with reading(row.runs, model.device, handed_down=handed_down) as layout:
        output = model.base_model(
            input_ids=integers([row.ids], model.device),
            position_ids=integers([row.positions], model.device),
            use_cache=False,
            **({"layout": layout} if handed_down else {}),
        )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def has_decoder_head(model: Any) -> bool:
    """Whether a model has the head of a decoder, without which it does not read packed rows."""
    heads = (getattr(model, name, None) for name in ("score", "lm_head"))
    return any(isinstance(head, torch.nn.Linear) for head in heads)


@torch.inference_mode()
def share_prompts(model: Any, *, handed_down: bool = False) -> bool:
    """Switch a decoder to packed rows; encoders, and decoders of an attention of their own, stay.

    Args:
        handed_down: rows are to be read as `read_row` does with it.
    Returns: whether the model reads packed rows now.
    """
    if not has_decoder_head(model):
        return False
    before = model.config._attn_implementation
    texts, row = _probe(model)
    of_a_length = texts[::2], texts[1::2]
    own = torch.stack([_read(model, some) for some in of_a_length], dim=1)
    expected = own.flatten(0, 1)[row.texts]
    for implementation in IMPLEMENTATIONS:
        try:
            model.set_attn_implementation(implementation)
            if _is_close(_read_probe(model, handed_down=handed_down), expected):
                return True
        except (TypeError, ValueError, RuntimeError, LookupError):
            continue
    model.set_attn_implementation(before)
    return False


@torch.inference_mode()
def drops_attention(model: Any) -> bool:
    """Whether the attention of a decoder has dropout in training, which packed attention has not.

    Tried, since configurations have several names for it, and trainers switch some of it off.
    """
    before = model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    kind = model.device.type
    devices = [] if kind == "cpu" else [model.device]
    model.train()
    try:
        model.set_attn_implementation("cwpo_shared_prefix")
        # What else has dropout draws nothing that training would.
        with torch.random.fork_rng(devices, device_type=kind):
            _read_probe(model)
    except AttentionDropoutError:
        return True
    except (TypeError, ValueError, RuntimeError, LookupError):
        return False
    finally:
        model.set_attn_implementation(before)
        model.eval()
        for module in training:
            module.training = True
    return False


@torch.inference_mode()
def compile_layers(model: Any) -> None:
    """Compile the layers of a decoder that reads packed rows, if it keeps them in a list.

    Between the matrix products of a layer, a GPU then reads and writes memory once where it did so
    for each operation. Compiling takes some seconds, and needs a C compiler.
    """
    lists = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    if (layers := next(lists, None)) is None:
        return
    before, expected = [*layers], _read_probe(model)
    disable: Any = torch.compiler.disable
    compiled: Any = torch.compile
    for name, implementation in IMPLEMENTATIONS.items():
        # They read a layout, which is another one in every pass.
        AttentionInterface.register(name, disable(implementation))
    for at, layer in enumerate(before):
        layers[at] = compiled(layer, dynamic=True)
    try:
        if _is_close(_read_probe(model), expected):
            return
        reason = "its hidden states would be others"
    except Exception as error:  # Of the compiler behind the compiler, whichever that is.
        reason = first_line(error)
    logger.warning("the model's layers are not compiled, and slower for it: %s", reason)
    for at, layer in enumerate(before):
        layers[at] = layer


def _probe(model: Any) -> tuple[list[list[int]], Row]:
    """Short texts, of which each two begin alike, and the row that they make."""
    draw = np.random.default_rng(0)
    known = model.get_input_embeddings().weight.shape[0]
    texts = []
    for _ in range(_PROBES):
        prompt = draw.integers(known, size=_SHARED).tolist()
        texts += [[*prompt, *draw.integers(known, size=own).tolist()] for own in _OWN]
    (row,) = pack_texts(texts, 1024)
    return texts, row


def _read(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The last hidden state of each of these texts of one length."""
    output = model.base_model(input_ids=integers(texts, model.device), use_cache=False)
    last: torch.Tensor = output.last_hidden_state[:, -1]
    return last


def _read_probe(model: Any, *, handed_down: bool = False) -> torch.Tensor:
    _, row = _probe(model)
    return read_row(model, row, handed_down=handed_down)[row.last]


def _is_close(hidden: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the hidden states of three texts in four are what is expected."""
    # Another mask or other positions change those of half the texts by the order of their size. In
    # bfloat16, rounding alone may do so to a text of no meaning, but not to many.
    autocast = torch.is_autocast_enabled(hidden.device.type)
    tolerance = 1e-3 if hidden.dtype == torch.float32 and not autocast else 0.1
    errors = (hidden.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
    return bool(errors.quantile(0.75) < tolerance)
