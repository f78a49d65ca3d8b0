"""Packs pairs and texts into rows without padding, in which a prompt appears only once."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cwpo_annotator.encoded import EncodedPair


@dataclass(frozen=True, slots=True)
class Segment:
    """One pair inside a row: a prompt, the rest of the first text, the rest of the second.

    The second text's tokens attend to the prompt and to one another, but not to the first text. A
    single text is a segment whose second part is empty.
    """

    start: int
    prompt: int
    first: int
    second: int


@dataclass(slots=True)
class Row:
    """Consecutive segments; the model reads `ids` and `positions`.

    texts: index of each text in the input. last: index of the last token of each text in the row,
    where its score is read, in the order of `texts`.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)

    def places(self) -> Iterator[list[int]]:
        """The positions of each text's tokens in the row, in the order of `texts`."""
        in_pairs = len(self.texts) == 2 * len(self.segments)
        for segment in self.segments:
            end_of_prompt = segment.start + segment.prompt
            stop = end_of_prompt + segment.first
            first = [*range(segment.start, stop)]
            yield first
            if in_pairs:
                own = range(stop, stop + segment.second)
                yield [*range(segment.start, end_of_prompt), *own] if own else first

    def append(self, first: Sequence[int], rest: Sequence[int], shared: int) -> None:
        """Append a segment: a text, and the rest of a second text after the shared prefix."""
        start = len(self.ids)
        self.ids += first
        self.positions += range(len(first))
        self.last.append(len(self.ids) - 1)
        self.ids += rest
        self.positions += range(shared, shared + len(rest))
        self.segments.append(Segment(start, shared, len(first) - shared, len(rest)))


def pack_pairs(
    pairs: Sequence[EncodedPair], token_budget: int, *, multiple_of: int = 1
) -> Iterator[Row]:
    """Rows of at most token_budget tokens (or one pair that is larger), nearly equal in length.

    Text 2i is response a of pair i, and text 2i + 1 its response b. The shorter text of a pair
    comes first, so that swapping a and b gives the same row and exactly the opposite margin.

    Args:
        multiple_of: number of which the number of rows should be a multiple, if there are enough
            pairs.
    """
    segments = [_segment(pair) for pair in pairs]
    sizes = [len(first) + len(rest) for first, rest, _, _ in segments]
    for group in balanced(sizes, token_budget, multiple_of):
        row = Row()
        for index in group:
            first, rest, shared, is_swapped = segments[index]
            row.append(first, rest, shared)
            # Equal texts are read once: their scores are the very same number, and the pair a tie.
            row.last.append(len(row.ids) - 1)
            row.texts += (2 * index + is_swapped, 2 * index + (not is_swapped))
        yield row


def _segment(pair: EncodedPair) -> tuple[Sequence[int], Sequence[int], int, bool]:
    """The shorter text, the rest of the other, their shared length, and whether b comes first."""
    is_swapped = (len(pair.b), pair.b) < (len(pair.a), pair.a)
    first, second = (pair.b, pair.a) if is_swapped else (pair.a, pair.b)
    # Each text keeps a token of its own to read its score at.
    shared = min(pair.shared, len(first) - 1)
    return first, [] if first == second else second[shared:], shared, is_swapped


def pack_texts(
    texts: Sequence[Sequence[int]], token_budget: int, *, multiple_of: int = 1
) -> Iterator[Row]:
    """Rows of single texts; see pack_pairs."""
    for group in balanced([len(ids) for ids in texts], token_budget, multiple_of):
        row = Row(texts=group)
        for index in group:
            row.append(texts[index], [], 0)
        yield row


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
