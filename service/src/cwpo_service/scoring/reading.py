"""In which order the items of a request are read, and how many of them fill a batch."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from cwpo_annotator.backends.base import ReadsOnce
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_annotator.scores import Scores

# The free tokens of a batch that are better than one token that is read again.
_FREE = 4
_ID_BYTES = array("I").itemsize


class Item(Protocol):
    """A tokenised pair or text to score."""

    @property
    def tokens(self) -> int:
        """Number of tokens of its texts, each read by itself."""
        ...

    @property
    def texts(self) -> tuple[Sequence[int], ...]:
        """The token ids of its texts."""
        ...


class Stretch(NamedTuple):
    """Items before `stop`, and the tokens that are read for them in one batch."""

    stop: int
    tokens: int


class Reading:
    """Items that are read each by itself, in input order.

    items: in the order in which they are read; sizes: the tokens that each of them adds to those
    before it.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.sizes: Sequence[int] = [item.tokens for item in items]

    def stretch(self, start: int, budget: int, *, at_least: int) -> Stretch:
        """The items from `start` on that are read in one batch.

        Args:
            budget: maximum number of tokens.
            at_least: number of items to read even if they exceed the budget.
        """
        stop, tokens = start, 0
        for size in self.sizes[start:]:
            if tokens + size > budget and stop - start >= at_least:
                break
            tokens += size
            stop += 1
        return Stretch(stop, tokens)

    def in_input_order(self, scores: Scores) -> Scores:
        """The scores of all items in the order of the input, from those in the order of reading."""
        return scores


class _Text(NamedTuple):
    """A text: equal ones have one number; `shared` tokens begin the text read before it too."""

    number: int
    tokens: int
    shared: int


class SharedReading(Reading):
    """Items of which a batch reads equal texts once, and perhaps what texts begin with, too.

    Those that begin alike are read one after the other.

    Args:
        beginnings: whether what a text has in common with the one before it is not read again.
    """

    def __init__(self, items: Sequence[Item], *, beginnings: bool) -> None:
        # As bytes they are ordered, found again and compared in a third of the time.
        texts = [[array("I", ids).tobytes() for ids in item.texts] for item in items]
        self._order = sorted(range(len(items)), key=texts.__getitem__)
        self._texts = [*_numbered([texts[at] for at in self._order], beginnings=beginnings)]
        self.items = [items[at] for at in self._order]
        self.sizes = [*self._added(0)]

    def stretch(self, start: int, budget: int, *, at_least: int) -> Stretch:
        """The items from `start` on that are read in one batch.

        It ends where little has to be read again for the next one, such as between two prompts.
        """
        best, tokens, most = Stretch(start, 0), 0, -float("inf")
        for at, added in enumerate(self._added(start), start):
            if at - start >= at_least:
                worth = tokens - _FREE * self._texts[at][0].shared
                if worth >= most:
                    best, most = Stretch(at, tokens), worth
                if tokens + added > budget:
                    return best
            tokens += added
        return Stretch(len(self.items), tokens)

    def in_input_order(self, scores: Scores) -> Scores:
        """The scores of all items in the order of the input, from those in the order of reading."""
        return scores[np.argsort(self._order)]

    def _added(self, start: int) -> Iterator[int]:
        """The tokens that each item from `start` on adds to a batch that begins there."""
        read: set[int] = set()
        for of_item in islice(self._texts, start, None):
            tokens = 0
            for text in of_item:
                if text.number not in read:
                    tokens += text.tokens - (text.shared if read else 0)
                    read.add(text.number)
            yield tokens


def reading_of(items: Sequence[Item], reads_once: ReadsOnce) -> Reading:
    """How a backend that reads this once reads the items of a request."""
    if reads_once == "nothing":
        return Reading(items)
    return SharedReading(items, beginnings=reads_once == "beginnings")


def _numbered(items: Sequence[Sequence[bytes]], *, beginnings: bool) -> Iterator[list[_Text]]:
    """The texts of each item, in the order of reading."""
    numbers: dict[bytes, int] = {}
    before = b""
    for texts in items:
        of_item = []
        for text in texts:
            number = numbers.setdefault(text, len(numbers))
            shared = common_prefix(before, text) // _ID_BYTES if beginnings else 0
            of_item.append(_Text(number, len(text) // _ID_BYTES, shared))
            before = text
        yield of_item
