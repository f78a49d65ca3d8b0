"""Attention over packed rows, where both responses of a pair share one copy of their prompt.

All other layers of a decoder process each token separately, so a packed row needs only restarted
positions (`Row.positions`) and this attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cwpo_annotator.backends.torch.rows.layout import Layout, Run, reading, row_being_read
from cwpo_annotator.backends.torch.rows.packing import Row, pack_pairs
from cwpo_annotator.backends.torch.rows.products import attention_by_products
from cwpo_annotator.encoded import EncodedPair

# Names of the two implementations of attention in transformers' registry, the faster first.
AT_ONCE, BY_RUNS = "cwpo_shared_prefix_at_once", "cwpo_shared_prefix"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    at_once: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each text of a packed row.

    Args:
        query: (1, heads, tokens, width); key, value: (1, key heads, tokens, width).
        at_once: use one call of flash attention, for GPUs and half precision, where a call for each
            run would take longer to launch than to compute.
    Returns: (1, tokens, heads, width).
    Raises: ValueError for soft-capped attention, which is not supported; RuntimeError if flash
        attention is not available.
    """
    if softcap is not None:
        raise ValueError("soft-capped attention cannot be packed")
    row = row_being_read()
    in_products = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if at_once:
        output = _flash(row, query, key, value, scaling, sliding_window)
    elif in_products and not torch.is_grad_enabled():
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
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        states[0].transpose(0, 1)[row.keys].repeat_interleave(groups, dim=1)
        for states in (key, value)
    )
    output: Any = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        row.token_bounds,
        row.key_bounds,
        max(len(run.tokens) for run in row.runs),
        max(run.keys for run in row.runs),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
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


AttentionInterface.register(AT_ONCE, partial(attention, at_once=True))
AttentionInterface.register(BY_RUNS, attention)
for name in (AT_ONCE, BY_RUNS):
    # The attention above knows what sees what; no mask is to be built.
    AttentionMaskInterface.register(name, lambda *_, **__: None)


def read_row(model: Any, row: Row) -> torch.Tensor:
    """Hidden states of a packed row, shape (tokens, width), from a model after `share_prompts`."""
    with reading(row.segments, model.device):
        output = model.base_model(
            input_ids=torch.tensor([row.ids], device=model.device),
            position_ids=torch.tensor([row.positions], device=model.device),
            use_cache=False,
        )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


@torch.inference_mode()
def share_prompts(model: Any) -> bool:
    """Switch a decoder to shared prompts, if its hidden states then stay the same.

    Encoders, and decoders with an attention of their own, stay as they are.
    """
    heads = (getattr(model, name, None) for name in ("score", "lm_head"))
    if not any(isinstance(head, torch.nn.Linear) for head in heads):
        return False
    before = model.config._attn_implementation
    texts = torch.arange(3, 15), torch.cat((torch.arange(3, 9), torch.arange(20, 24)))
    (row,) = pack_pairs([EncodedPair(texts[0].tolist(), texts[1].tolist(), shared=6)], 1024)
    ids = (texts[index] for index in row.texts)
    own = [model.base_model(input_ids=text[None].to(model.device)) for text in ids]
    expected = torch.stack([output.last_hidden_state[0, -1] for output in own]).float()
    for implementation in (AT_ONCE, BY_RUNS):
        try:
            model.set_attn_implementation(implementation)
            error = (read_row(model, row)[row.last].float() - expected).norm() / expected.norm()
        except (TypeError, ValueError, RuntimeError, LookupError):
            continue
        # Another mask or other positions change hidden states by the order of their size.
        if error < (1e-3 if model.dtype == torch.float32 else 0.1):
            return True
    model.set_attn_implementation(before)
    return False
