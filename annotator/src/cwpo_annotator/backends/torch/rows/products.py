"""Attention over a packed row by plain matrix products, the fastest way in bfloat16 on a CPU.

There, torch's fused attention is as slow in bfloat16 as in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat

import torch

from cwpo_annotator.backends.torch.rows.layout import Layout, Run, runs
from cwpo_annotator.backends.torch.rows.packing import Segment

# Queries a block: a larger one sees more keys in vain, a smaller one makes the products thin.
_BLOCK = 128
# Tokens of a segment that is one block: many small operations would take longer than they save.
_WHOLE = 256
# Over bfloat16 rows of other lengths torch's softmax is up to five times as slow.
_ALIGNMENT = 32
# Fills keys up to the alignment.
_NO_KEY = -1


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries, and the keys that they attend to, possibly among others.

    Args:
        tokens: positions of the queries in the row.
        keys: the block's keys among the concatenated keys of all blocks.
        mask: added to the attention logits of the last keys, shape (queries, last keys).
    """

    tokens: slice
    keys: slice
    mask: torch.Tensor


def attention_by_products(
    row: Layout, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Causal attention within each text of the row.

    Args:
        query: (heads, tokens, width), scaled; key, value: (key heads, tokens, width).
        window: maximum number of keys that a query attends to.
    Returns: (heads, tokens, width).
    """
    heads, _, width = query.shape
    groups = len(key)
    # Models may have layers of two windows.
    if (window, query.dtype) not in row.prepared:
        row.prepared[window, query.dtype] = _blocks(row, window, query.dtype)
    places, blocks = row.prepared[window, query.dtype]
    key, value = (
        states.transpose(0, 1).index_select(0, places).transpose(0, 1) for states in (key, value)
    )
    output = torch.empty_like(query)
    for block in blocks:
        # The heads that share a key head are rows of one product.
        rows = query[:, block.tokens].reshape(groups, -1, width)
        # Left to itself, the product would copy the keys in the slow order, that of their columns.
        keys = key[:, block.keys].contiguous()
        weights = torch.bmm(rows, keys.transpose(1, 2))
        weights = weights.view(heads, len(block.mask), -1)
        weights[..., -block.mask.shape[1] :].add_(block.mask)
        weights = torch.softmax(weights, dim=-1).view(groups, rows.shape[1], -1)
        output[:, block.tokens] = torch.bmm(weights, value[:, block.keys]).view(heads, -1, width)
    return output


def _blocks(
    row: Layout, window: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, list[Block]]:
    """The blocks of a row, and where in it their keys are."""
    places: list[int] = []
    blocks = []
    for segment in row.segments:
        length = segment.prompt + segment.first + segment.second
        is_whole = length <= _WHOLE
        every = range(segment.start, segment.start + length)
        for run in [Run(every, (every,))] if is_whole else runs(segment):
            begin = len(places)
            places += chain(*run.seen, repeat(_NO_KEY, -run.keys % _ALIGNMENT))
            keys = torch.tensor(places[begin:])
            for tokens, seen, masked in _parts(run, _WHOLE if is_whole else _BLOCK, window):
                queries = torch.tensor(run.tokens[tokens])[:, None]
                hidden = _hidden(segment, queries, keys[masked : seen.stop], window)
                mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
                in_row = slice(run.tokens[tokens.start], run.tokens[tokens.start] + len(queries))
                blocks.append(Block(in_row, slice(begin + seen.start, begin + seen.stop), mask))
    return torch.tensor(places).clamp_(0), blocks


def _parts(run: Run, size: int, window: int | None) -> Iterator[tuple[slice, slice, int]]:
    """Of each block: its tokens and keys among the run's, and the first key that has a mask."""
    before = run.keys - len(run.tokens)
    for start in range(0, len(run.tokens), size):
        stop = min(start + size, len(run.tokens))
        own, last = before + start, before + stop
        aligned = -(-last // _ALIGNMENT) * _ALIGNMENT
        if window is None or last <= window:
            yield slice(start, stop), slice(0, aligned), own
        else:
            first = max(0, own - window + 1) // _ALIGNMENT * _ALIGNMENT
            yield slice(start, stop), slice(first, aligned), first


def _hidden(
    segment: Segment, queries: torch.Tensor, keys: torch.Tensor, window: int | None
) -> torch.Tensor:
    """True where a query does not see a key; both by their places, shape (n, 1) and (m,)."""
    own = segment.start + segment.prompt
    second = own + segment.first
    hidden = (keys > queries) | (keys == _NO_KEY)
    hidden |= (queries >= second) & (keys >= own) & (keys < second)
    if window is not None:
        distance = queries - keys - segment.first * ((queries >= second) & (keys < own))
        hidden |= distance >= window
    return hidden
