"""A packed row: texts that a model reads at once, each beginning that they share only once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens of a text that the texts before it in the row do not begin with.

    tokens: their places in the row. seen: the places of all tokens of the text, in order. The last
    of the run's own tokens attends to all of them, and each token before it to one place less.
    """

    tokens: range
    seen: tuple[range, ...]

    @property
    def keys(self) -> int:
        """Number of places that the last token attends to."""
        return sum(map(len, self.seen))

    def first(self, count: int) -> tuple[range, ...]:
        """The places of the text's first tokens."""
        places: list[range] = []
        for part in self.seen:
            if count > 0:
                places.append(part[:count])
                count -= len(part)
        return tuple(places)


@dataclass(slots=True)
class Row:
    """Texts one after the other; the model reads `ids` at `positions`.

    runs: one of each distinct text, in the order of their tokens. texts: index of each text in the
    input. last: place of the last token of each text, where its score is read, in the order of
    `texts`; equal texts have the same.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def append(self, ids: Sequence[int], texts: Iterable[int], shared: int) -> None:
        """Append a text that begins with the first tokens of the text before it.

        Args:
            texts: its indices in the input.
            shared: number of these tokens, fewer than it has.
        """
        own = range(len(self.ids), len(self.ids) + len(ids) - shared)
        self.ids += ids[shared:]
        self.positions += range(shared, len(ids))
        beginning = self.runs[-1].first(shared) if shared else ()
        self.runs.append(Run(own, (*beginning, own)))
        for text in texts:
            self.texts.append(text)
            self.last.append(own[-1])

    def fill(self, multiple: int) -> None:
        """Append tokens of no text, up to a multiple of so many."""
        missing = -len(self.ids) % multiple
        if missing:
            self.append([0] * missing, (), shared=0)

    def places(self) -> Iterator[list[int]]:
        """The places of each text's tokens in the row, in the order of `texts`."""
        of_text = {run.tokens[-1]: run.seen for run in self.runs}
        for last in self.last:
            yield [*chain(*of_text[last])]
