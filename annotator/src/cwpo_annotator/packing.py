"""How pairs and texts are laid out for the model: rows without padding, prompts only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cwpo_annotator.backends.base import EncodedPair


@dataclass(frozen=True, slots=True)
class Segment:
    """One pair inside a row: a prompt, the rest of the first text, the rest of the second.

    The second text's tokens see the prompt and themselves; never the first's. A single text is a
    segment whose second part is empty.
    """

    start: int
    prompt: int
    first: int
    second: int


@dataclass(slots=True)
class Row:
    """Segments one after the other; `ids` and `positions` are what the model reads.

    last: where the scores are read, the index of the last token of each text, in the order of
    `texts`, the index of each text in the input.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)

    def places(self) -> Iterator[list[int]]:
        """Where the tokens of each text stand in the row, in the order of `texts`."""
        in_pairs = len(self.texts) == 2 * len(self.segments)
        for segment in self.segments:
            end_of_prompt = segment.start + segment.prompt
            stop = end_of_prompt + segment.first
            first = [*range(segment.start, stop)]
            yield first
            if in_pairs:
                own = range(stop, stop + segment.second)
                yield [*range(segment.start, end_of_prompt), *own] if own else first


def pack_pairs(pairs: Sequence[EncodedPair], token_budget: int) -> Iterator[Row]:
    """Rows of at most token_budget tokens (or one pair that is larger), in input order.

    Text 2i is pair i's a, text 2i + 1 its b. The shorter text of a pair comes first, whatever its
    name, so that swapping a and b gives the very same row and an exactly opposite margin.
    """
    row = Row()
    for index, pair in enumerate(pairs):
        ordered = sorted(((pair.a, 2 * index), (pair.b, 2 * index + 1)), key=_canonical)
        (first, first_text), (second, second_text) = ordered
        # Each text keeps a token of its own to read its score at.
        shared = min(pair.shared, len(first) - 1)
        if row.ids and len(row.ids) + pair.tokens - shared > token_budget:
            yield row
            row = Row()
        _append(row, first, second, shared)
        row.texts += first_text, second_text
    if row.ids:
        yield row


def _append(row: Row, first: Sequence[int], second: Sequence[int], shared: int) -> None:
    start = len(row.ids)
    row.ids += first
    row.positions += range(len(first))
    row.last.append(len(row.ids) - 1)
    # Equal texts are read once: their scores are the very same number, and the pair a tie.
    rest = [] if first == second else second[shared:]
    row.ids += rest
    row.positions += range(shared, shared + len(rest))
    row.last.append(len(row.ids) - 1)
    row.segments.append(Segment(start, shared, len(first) - shared, len(rest)))


def pack_texts(texts: Sequence[Sequence[int]], token_budget: int) -> Iterator[Row]:
    """Rows of single texts, in input order."""
    row = Row()
    for index, ids in enumerate(texts):
        if row.ids and len(row.ids) + len(ids) > token_budget:
            yield row
            row = Row()
        row.segments.append(Segment(len(row.ids), 0, len(ids), 0))
        row.ids += ids
        row.positions += range(len(ids))
        row.last.append(len(row.ids) - 1)
        row.texts.append(index)
    if row.ids:
        yield row


def length_sorted(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of like lengths, longest first, each within the budget when padded."""
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batches and (len(batches[-1]) + 1) * width <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
    return batches


def _canonical(text: tuple[Sequence[int], int]) -> tuple[int, Sequence[int]]:
    return len(text[0]), text[0]
