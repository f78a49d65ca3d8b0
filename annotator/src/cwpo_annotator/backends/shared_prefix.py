"""Attention over packed rows, where both responses of a pair share one copy of their prompt.

All other layers of a decoder act on each token alone, so a row of packed tokens needs nothing
more than restarted positions (packing.Row) and this attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cwpo_annotator.packing import Segment

NAME = "cwpo_shared_prefix"
# Queries a block: a larger one sees more keys in vain, a smaller one makes the products thin.
_BLOCK = 128

# Not every architecture hands extra arguments down to its attention, so the layout of the row in
# work goes around them.
_segments: ContextVar[Sequence[Segment]] = ContextVar("segments")


@contextmanager
def layout(segments: Sequence[Segment]) -> Iterator[None]:
    """The segments of the row that the model reads inside the block."""
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each text of a packed row.

    Args:
        query: (1, heads, tokens, width); key, value: (1, key heads, tokens, width).
    Returns: (1, tokens, heads, width).
    Raises: ValueError for soft-capped attention, which this does not do.
    """
    if softcap is not None:
        raise ValueError("soft-capped attention cannot be packed")
    # The CPU's fused attention is as slow in bfloat16 as in float32; products are not.
    in_products = query.device.type == "cpu" and query.dtype == torch.bfloat16
    causal = _products if in_products and not torch.is_grad_enabled() else _fused
    output = torch.empty_like(query)
    for segment in _segments.get():
        start, stop = segment.start, segment.start + segment.prompt + segment.first
        output[:, :, start:stop] = causal(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            scaling,
            sliding_window,
        )
        if segment.second:
            prompt = slice(start, start + segment.prompt)
            own = slice(stop, stop + segment.second)
            output[:, :, own] = causal(
                query[:, :, own],
                torch.cat((key[:, :, prompt], key[:, :, own]), dim=2),
                torch.cat((value[:, :, prompt], value[:, :, own]), dim=2),
                scaling,
                sliding_window,
            )
    return output.transpose(1, 2), None


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention of the last queries of a text to all its keys up to themselves."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    queries, keys = query.shape[2], key.shape[2]
    is_whole = queries == keys and (window is None or keys <= window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if is_whole else ~_hidden(queries, keys, window, query.device),
        is_causal=is_whole,
        scale=scaling,
    )


def _products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """As _fused, in two matrix products a block of queries, over the keys that the block sees."""
    heads, queries, width = query.shape[1:]
    key_heads, keys = key.shape[1:3]
    query = query * (width**-0.5 if scaling is None else scaling)
    later = _hidden(_BLOCK, _BLOCK, None, query.device)
    output = torch.empty_like(query)
    for start in range(0, queries, _BLOCK):
        block = slice(start, min(start + _BLOCK, queries))
        size = block.stop - block.start
        last = keys - queries + block.stop
        seen = slice(0 if window is None else max(0, last - size - window + 1), last)
        # The heads that share a key head are rows of one product.
        rows = query[0, :, block].reshape(key_heads, -1, width)
        weights = torch.bmm(rows, key[0, :, seen].transpose(1, 2)).view(heads, size, -1)
        if window is None or last <= window:
            weights[..., -size:].masked_fill_(later[:size, :size], -torch.inf)
        else:
            weights.masked_fill_(_hidden(size, weights.shape[2], window, query.device), -torch.inf)
        weights = torch.softmax(weights, dim=-1).view(key_heads, -1, weights.shape[2])
        output[0, :, block] = torch.bmm(weights, value[0, :, seen]).view(heads, size, width)
    return output


def _hidden(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """True where one of the last queries does not see a key, shape (queries, keys)."""
    sees = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return ~(sees if window is None else sees.triu(keys - queries - window + 1))


AttentionInterface.register(NAME, attention)
# The attention above knows what sees what; no mask is to be built.
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
