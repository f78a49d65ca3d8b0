"""Attention over packed rows, where texts share one copy of what they begin with.

All other layers of a decoder process each token separately, so a packed row needs only restarted
positions (`Row.positions`) and this attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cwpo_annotator.backends.torch.rows.layout import Layout, is_reading, row_being_read
from cwpo_annotator.backends.torch.rows.products import attention_by_products
from cwpo_annotator.backends.torch.rows.row import Run

# torch 2.11 takes several queries for a key unasked.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)


class AttentionDropoutError(ValueError):
    """Attention with dropout was asked for over a packed row, which has none."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    at_once: bool = False,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each text of a packed row; outside of rows, transformers' own.

    Args:
        query: (1, heads, tokens, width); key, value: (1, key heads, tokens, width).
        layout: of the row; None for the one that `reading` tells.
        at_once: use one call of flash attention, for GPUs and half precision, where a call for each
            run would take longer to launch than to compute.
    Returns: (1, tokens, heads, width).
    Raises: ValueError for soft-capped attention, which is not supported; AttentionDropoutError;
        RuntimeError if flash attention is not available.
    """
    if softcap is not None:
        raise ValueError("soft-capped attention cannot be packed")
    row = layout or row_being_read()
    if row is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return plain
    if dropout:
        raise AttentionDropoutError("attention with dropout cannot be packed")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # As autocast does for attention that it knows.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    in_products = kind == "cpu" and query.dtype == torch.bfloat16
    if at_once:
        output = _flash(row, query, key, value, scaling, sliding_window)
    elif in_products:
        scaled = query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        output = attention_by_products(row, scaled, key[0], value[0], sliding_window)[None]
    else:
        output = _fused(row, query, key, value, scaling, sliding_window)
    return output.transpose(1, 2), None


def _flash(
    row: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention in one call of torch's flash attention for sequences of different lengths."""
    keys, values = (states[0].transpose(0, 1)[row.keys] for states in (key, value))
    output: Any = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        row.token_bounds,
        row.key_bounds,
        *row.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **_GROUPED,
    )
    at_once: torch.Tensor = output.transpose(0, 1)[None]
    return at_once


def _fused(
    row: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention with one call of torch's fused attention for each run."""
    groups = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for run in row.runs:
        tokens = slice(run.tokens.start, run.tokens.stop)
        keys, values = (
            _seen(run, states).repeat_interleave(groups, dim=1) for states in (key, value)
        )
        own = len(run.tokens)
        is_whole = own == run.keys and (window is None or own <= window)
        output[:, :, tokens] = scaled_dot_product_attention(
            query[:, :, tokens],
            keys,
            values,
            attn_mask=None if is_whole else _sees(own, run.keys, window, query.device),
            is_causal=is_whole,
            scale=scaling,
        )
    return output


def _seen(run: Run, states: torch.Tensor) -> torch.Tensor:
    """The keys or values that a run attends to: (1, key heads, tokens, width), fewer tokens."""
    parts = [states[:, :, places.start : places.stop] for places in run.seen]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _sees(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Whether each of the last queries attends to each key, shape (queries, keys)."""
    sees = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return sees if window is None else sees.triu(keys - queries - window + 1)


def _mask(**arguments: Any) -> torch.Tensor | None:
    """No mask for a row, whose layout tells what sees what; otherwise that of transformers."""
    mask: torch.Tensor | None = None if is_reading() else sdpa_mask(**arguments)
    return mask


# The implementations by their names in transformers' registry, the faster first.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "cwpo_shared_prefix_at_once": partial(attention, at_once=True),
    "cwpo_shared_prefix": attention,
}
for name, implementation in IMPLEMENTATIONS.items():
    AttentionInterface.register(name, implementation)
    AttentionMaskInterface.register(name, _mask)
