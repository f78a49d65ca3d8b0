"""Who sees whom in a packed row, as indices for attention."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import torch

from cwpo_annotator.packing import Segment


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of a text.

    tokens: their places in the row. seen: the places that the last of them sees, its own at the
    end; each token before it sees one less.
    """

    tokens: range
    seen: tuple[range, ...]

    @property
    def keys(self) -> int:
        """How many places are seen."""
        return sum(map(len, self.seen))


class Layout:
    """The runs of a row, one after the other.

    Args:
        segments: of the row.
        device: of the model that reads it.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = segments
        self.device = device
        # What an attention has made of it, for the layers to come.
        self.prepared: dict[Hashable, Any] = {}

    @cached_property
    def runs(self) -> list[Run]:
        """Of all segments, in the order of their tokens."""
        return [run for segment in self.segments for run in runs(segment)]

    @cached_property
    def keys(self) -> torch.Tensor:
        """The places that the runs see, run after run."""
        places = chain.from_iterable(places for run in self.runs for places in run.seen)
        return torch.tensor([*places], device=self.device)

    @cached_property
    def key_bounds(self) -> torch.Tensor:
        """Where the keys of each run begin, and where the last ones end: int32, (runs + 1,)."""
        return self._bounds([run.keys for run in self.runs])

    @cached_property
    def token_bounds(self) -> torch.Tensor:
        """The same of their tokens in the row."""
        return self._bounds([len(run.tokens) for run in self.runs])

    def _bounds(self, counts: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=self.device)


def runs(segment: Segment) -> Iterator[Run]:
    """The first text of a segment, and what of the second is not in it."""
    first = range(segment.start, segment.start + segment.prompt + segment.first)
    yield Run(first, (first,))
    if segment.second:
        own = range(first.stop, first.stop + segment.second)
        yield Run(own, (first[: segment.prompt], own))


# Not every architecture hands extra arguments down to its attention, so the layout of the row in
# work goes around them.
_current: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def reading(segments: Sequence[Segment], device: torch.device) -> Iterator[None]:
    """A model on the device reads a row of these segments inside the block."""
    token = _current.set(Layout(segments, device))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Layout:
    """Of the row that the model reads."""
    return _current.get()
