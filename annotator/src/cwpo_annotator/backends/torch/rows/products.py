"""Attention over a packed row by plain matrix products, the fastest way in bfloat16 on a CPU.

There, torch's fused attention is as slow in bfloat16 as in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch

from cwpo_annotator.backends.torch.rows.layout import Layout
from cwpo_annotator.backends.torch.rows.row import Run

# Queries a block: a larger one sees more keys in vain, a smaller one makes the products thin.
_BLOCK = 128
# Most keys of a block of several runs: many small operations would take longer than they save.
_WHOLE = 256
# Over bfloat16 rows of other lengths torch's softmax is up to five times as slow.
_ALIGNMENT = 32


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
    outputs = []
    for block in blocks:
        # The heads that share a key head are rows of one product.
        rows = query[:, block.tokens].reshape(groups, -1, width)
        # Left to itself, the product would copy the keys in the slow order, that of their columns.
        keys = key[:, block.keys].contiguous()
        weights = torch.bmm(rows, keys.transpose(1, 2))
        weights = weights.view(heads, len(block.mask), -1)
        weights[..., -block.mask.shape[1] :].add_(block.mask)
        weights = torch.softmax(weights, dim=-1).view(groups, rows.shape[1], -1)
        outputs.append(torch.bmm(weights, value[:, block.keys]).view(heads, -1, width))
    return torch.cat(outputs, dim=1)


def _blocks(
    row: Layout, window: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, list[Block]]:
    """The blocks of a row, and where in it their keys are."""
    places: list[int] = []
    blocks = []
    for runs, keys in _groups(row.runs):
        begin = len(places)
        places += chain(keys, repeat(0, -len(keys) % _ALIGNMENT))
        if len(runs) > 1:
            tokens, stop = range(runs[0].tokens.start, runs[-1].tokens.stop), len(places)
            hidden = _hidden_in_group(runs, keys, stop - begin, window)
            blocks.append(_block(tokens, slice(begin, stop), hidden, dtype))
            continue
        (run,) = runs
        before = run.keys - len(run.tokens)
        for own, seen, masked in _parts(run, window):
            queries = torch.arange(before + own.start, before + own.stop)[:, None]
            hidden = _hidden(queries, torch.arange(masked, seen.stop), window)
            in_all = slice(begin + seen.start, begin + seen.stop)
            blocks.append(_block(run.tokens[own], in_all, hidden, dtype))
    return torch.tensor(places), blocks


def _groups(runs: Sequence[Run]) -> Iterator[tuple[list[Run], list[int]]]:
    """Neighbouring runs that have few keys together, or single ones, and the keys' places."""
    group: list[Run] = []
    keys: set[int] = set()
    for run in runs:
        of_run = [*chain(*run.seen)]
        if group and len(keys.union(of_run)) > _WHOLE:
            yield group, sorted(keys)
            group, keys = [], set()
        group.append(run)
        keys.update(of_run)
    yield group, sorted(keys)


def _block(tokens: range, keys: slice, hidden: torch.Tensor, dtype: torch.dtype) -> Block:
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return Block(slice(tokens.start, tokens.stop), keys, mask)


def _parts(run: Run, window: int | None) -> Iterator[tuple[slice, slice, int]]:
    """Of each block: its tokens and keys among the run's, and the first key that has a mask."""
    before = run.keys - len(run.tokens)
    for start in range(0, len(run.tokens), _BLOCK):
        stop = min(start + _BLOCK, len(run.tokens))
        own, last = before + start, before + stop
        aligned = -(-last // _ALIGNMENT) * _ALIGNMENT
        if window is None or last <= window:
            yield slice(start, stop), slice(0, aligned), own
        else:
            first = max(0, own - window + 1) // _ALIGNMENT * _ALIGNMENT
            yield slice(start, stop), slice(first, aligned), first


def _hidden_in_group(
    runs: Sequence[Run], keys: Sequence[int], width: int, window: int | None
) -> torch.Tensor:
    """True where a query does not see a key, shape (tokens of all runs, width)."""
    column = {place: at for at, place in enumerate(keys)}
    hidden = torch.ones(sum(len(run.tokens) for run in runs), width, dtype=torch.bool)
    row = 0
    for run in runs:
        seen = torch.arange(run.keys)
        columns = torch.tensor([column[place] for place in chain(*run.seen)])
        own = seen[-len(run.tokens) :, None]
        hidden[row : row + len(own)].index_copy_(1, columns, _hidden(own, seen, window))
        row += len(own)
    return hidden


def _hidden(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """True where a query does not see a key; both by their positions, shape (n, 1) and (m,)."""
    hidden = keys > queries
    return hidden if window is None else hidden | (queries - keys >= window)
