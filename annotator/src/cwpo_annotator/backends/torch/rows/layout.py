"""Which tokens of a packed row attend to which, as indices."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from cwpo_annotator.backends.torch.hardware.device import integers
from cwpo_annotator.backends.torch.rows.packing import Segment


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of a text.

    tokens: their positions in the row. seen: the positions that the last of them attends to, ending
    with its own; each token before it attends to one position less.
    """

    tokens: range
    seen: tuple[range, ...]

    @property
    def keys(self) -> int:
        """Number of positions that the last token attends to."""
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
        # What the attention of the first layer has worked out, for the layers after it.
        self.prepared: dict[Hashable, Any] = {}

    @cached_property
    def runs(self) -> list[Run]:
        """The runs of all segments, in the order of their tokens."""
        return [run for segment in self.segments for run in runs(segment)]

    @cached_property
    def keys(self) -> torch.Tensor:
        """The positions that the runs attend to, run after run."""
        places = [np.arange(own.start, own.stop) for run in self.runs for own in run.seen]
        return integers(np.concatenate(places), self.device)

    @cached_property
    def key_bounds(self) -> torch.Tensor:
        """Where each run's keys begin, and where those of the last end: int32, (runs + 1,)."""
        return self._bounds([run.keys for run in self.runs])

    @cached_property
    def token_bounds(self) -> torch.Tensor:
        """Where each run's tokens begin, and where those of the last end: int32, (runs + 1,)."""
        return self._bounds([len(run.tokens) for run in self.runs])

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most tokens of a run, and the most keys."""
        return max(len(run.tokens) for run in self.runs), max(run.keys for run in self.runs)

    def _bounds(self, counts: Sequence[int]) -> torch.Tensor:
        return integers([0, *accumulate(counts)], self.device, np.int32)


def runs(segment: Segment) -> Iterator[Run]:
    """The first text of a segment, and the rest of the second text after the shared prompt."""
    first = range(segment.start, segment.start + segment.prompt + segment.first)
    yield Run(first, (first,))
    if segment.second:
        own = range(first.stop, first.stop + segment.second)
        yield Run(own, (first[: segment.prompt], own))


# Not every architecture hands extra arguments down to its attention, so the layout of the row that
# a thread's model reads goes around them.
_row_being_read: ContextVar[Layout] = ContextVar("row_being_read")


@contextmanager
def reading(segments: Sequence[Segment], device: torch.device) -> Iterator[Layout]:
    """Inside the block, a model on the device reads a row of these segments."""
    layout = Layout(segments, device)
    token = _row_being_read.set(layout)
    try:
        yield layout
    finally:
        _row_being_read.reset(token)


def row_being_read() -> Layout:
    """The layout of the row that this thread's model is reading, inside `reading`."""
    return _row_being_read.get()
