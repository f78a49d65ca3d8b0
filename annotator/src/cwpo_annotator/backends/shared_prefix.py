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
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = torch.empty_like(query)
    for segment in _segments.get():
        start, stop = segment.start, segment.start + segment.prompt + segment.first
        output[:, :, start:stop] = _causal(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            scaling,
            sliding_window,
        )
        if segment.second:
            prompt = slice(start, start + segment.prompt)
            own = slice(stop, stop + segment.second)
            output[:, :, own] = _causal(
                query[:, :, own],
                torch.cat((key[:, :, prompt], key[:, :, own]), dim=2),
                torch.cat((value[:, :, prompt], value[:, :, own]), dim=2),
                scaling,
                sliding_window,
            )
    return output.transpose(1, 2), None


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention of the last queries of a text to all its keys up to themselves."""
    queries, keys = query.shape[2], key.shape[2]
    is_whole = queries == keys and (window is None or keys <= window)
    mask = None
    if not is_whole:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries)
        if window is not None:
            mask = mask.triu(keys - queries - window + 1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_whole, scale=scaling
    )


AttentionInterface.register(NAME, attention)
# The attention above knows what sees what; no mask is to be built.
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
