"""Packs texts into rows without padding, in which a beginning that texts share appears once."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, pairwise
from operator import itemgetter

from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.prefix import common_prefix

LEAST_SHARED = 16
"""Fewest tokens in common for which texts share them: fewer would save next to nothing."""

_Ids = tuple[int, ...]
# A text, and its numbers in the input.
_Text = tuple[_Ids, list[int]]
_Item = list[_Text]


def pack_texts(
    texts: Sequence[Sequence[int]],
    token_budget: int,
    *,
    multiple_of: int = 1,
    most_together: int | None = None,
) -> Iterator[Row]:
    """Rows of at most token_budget tokens (or one text that is larger), nearly equal in length.

    A text is read once, and so is what texts of a row have in common at their beginning, such as
    the prompt of several responses, or a dialogue that another one continues. The rows depend on
    the texts alone and not on their order, so that equal texts have the very same score, and
    swapping the responses of pairs gives exactly the opposite margins.

    Args:
        multiple_of: number of which the number of rows should be a multiple, if there are enough
            texts.
        most_together: number of tokens that texts with a common beginning may have in one row; by
            default the budget.
    """
    numbers: dict[_Ids, list[int]] = {}
    for number, ids in enumerate(texts):
        numbers.setdefault(tuple(ids), []).append(number)
    items = [[text] for text in numbers.items()]
    return _pack(items, token_budget, multiple_of, most_together or token_budget)


def pack_pairs(
    pairs: Sequence[EncodedPair],
    token_budget: int,
    *,
    multiple_of: int = 1,
    most_together: int | None = None,
) -> Iterator[Row]:
    """As pack_texts, but the two texts of a pair are in the same row.

    Text 2i is response a of pair i, and text 2i + 1 its response b.
    """
    items: list[_Item] = [
        [(tuple(pair.a), [2 * number]), (tuple(pair.b), [2 * number + 1])]
        for number, pair in enumerate(pairs)
    ]
    return _pack(items, token_budget, multiple_of, most_together or token_budget)


def _pack(
    items: Sequence[_Item], token_budget: int, multiple_of: int, most_together: int
) -> Iterator[Row]:
    """Rows of items, each of which is in one row."""
    in_order = sorted(sorted(item) for item in items)
    firsts = [(), *(item[0][0] for item in in_order)]
    shared = [_shared(before, first) for before, first in pairwise(firsts)]
    own = [_tokens(item) - common for item, common in zip(in_order, shared, strict=True)]
    limit = min(most_together, math.ceil(sum(own) / multiple_of))
    stretches = [*_stretches(own, shared, limit)]
    sizes = [shared[some.start] + sum(own[some.start : some.stop]) for some in stretches]
    for group in balanced(sizes, token_budget, multiple_of):
        row = Row()
        for stretch in group:
            together = in_order[stretches[stretch].start : stretches[stretch].stop]
            _append(row, sorted(chain(*together)))
        yield row


def _stretches(own: Sequence[int], shared: Sequence[int], limit: int) -> Iterator[range]:
    """Cuts a sequence where the fewest tokens are read twice for it.

    Args:
        own: tokens of each item beyond those that it shares with the item before it.
        shared: number of these; a cut before the item has them read again.
        limit: maximum number of tokens of a stretch of several items.
    """
    start, size, at = 0, 0, 0
    while at < len(own):
        grown = size + own[at] + (shared[at] if at == start else 0)
        if at > start and (not shared[at] or grown > limit):
            cut = min(range(at, start, -1), key=shared.__getitem__)
            yield range(start, cut)
            start, size, at = cut, 0, cut
        else:
            size, at = grown, at + 1
    if start < len(own):
        yield range(start, len(own))


def _append(row: Row, texts: Sequence[_Text]) -> None:
    """Append texts, in order."""
    before: _Ids = ()
    for ids, same in groupby(texts, key=itemgetter(0)):
        row.append(ids, chain(*(numbers for _, numbers in same)), _shared(before, ids))
        before = ids


def _tokens(item: _Item) -> int:
    """Tokens that the texts of an item in order take."""
    texts = [ids for ids, _ in item]
    return len(texts[0]) + sum(
        len(text) - _shared(before, text) for before, text in pairwise(texts) if before != text
    )


def _shared(before: _Ids, text: _Ids) -> int:
    """The tokens that a text shares with one before it in order, or none if they are few."""
    count = common_prefix(before, text)
    return count if count >= LEAST_SHARED else 0


def balanced(sizes: Sequence[int], limit: int, multiple_of: int = 1) -> list[list[int]]:
    """Indices in few groups of similar size, each at most the limit, or a single larger item.

    Args:
        multiple_of: number of which the number of groups should be a multiple, if there are enough
            items.
    """
    step = multiple_of if multiple_of <= len(sizes) else 1
    rounds = math.ceil(sum(min(size, limit) for size in sizes) / (limit * step))
    while True:
        groups = _spread(sizes, rounds * step)
        if all(len(group) <= 1 or sum(sizes[at] for at in group) <= limit for group in groups):
            return [group for group in groups if group]
        rounds += max(1, rounds // 50)


def _spread(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Assign each item, the largest first, to the group that is smallest so far."""
    groups: list[list[int]] = [[] for _ in range(count)]
    smallest = [(0, at) for at in range(count)]
    for index in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        size, at = smallest[0]
        groups[at].append(index)
        heapq.heapreplace(smallest, (size + sizes[index], at))
    return groups


def length_sorted(
    lengths: Sequence[int], token_budget: int, *, multiple_of: int = 1
) -> list[list[int]]:
    """Indices in batches of similar lengths, longest first, each within the budget when padded.

    Args:
        multiple_of: number of which the number of batches should be a multiple, at least
            approximately, if there are enough texts.
    """
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    batches = _filled(order, lengths, token_budget)
    if multiple_of == 1:
        return batches
    step = multiple_of if multiple_of <= len(lengths) else 1
    count = math.ceil(len(batches) / step) * step
    # The smallest budget that needs no more batches: with it none is much larger than the others.
    budget = bisect_left(
        range(token_budget), -count, key=lambda budget: -len(_filled(order, lengths, budget))
    )
    batches = _filled(order, lengths, budget)
    return batches if len(batches) >= step else _filled(order, lengths, budget - 1)


def _filled(order: Sequence[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Items in order, in as few batches as each is within the budget at the first one's length."""
    batches: list[list[int]] = []
    width = 0
    for index in order:
        if batches and (len(batches[-1]) + 1) * width <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
    return batches
