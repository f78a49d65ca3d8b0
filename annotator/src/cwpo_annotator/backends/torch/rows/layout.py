"""Which tokens of a packed row attend to which, as indices."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from cwpo_annotator.backends.torch.hardware.device import integers
from cwpo_annotator.backends.torch.rows.row import Run


class Layout:
    """The runs of a row.

    Args:
        runs: of the row, in the order of their tokens.
        device: of the model that reads it.
    """

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        self.runs = runs
        self.device = device
        # What the attention of the first layer has worked out, for the layers after it.
        self.prepared: dict[Hashable, Any] = {}

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


# Not every architecture hands extra arguments down to its attention, so the layout of the row that
# a thread's model reads goes around them; None stands for one that is handed down all the same.
_row_being_read: ContextVar[Layout | None] = ContextVar("row_being_read")


@contextmanager
def reading(
    runs: Sequence[Run], device: torch.device, *, handed_down: bool = False
) -> Iterator[Layout]:
    """Inside the block, a model on the device reads a row of these runs.

    Args:
        handed_down: the model gets the layout as an argument, which its layers still have when they
            compute their activations again in the backward pass.
    """
    layout = Layout(runs, device)
    token = _row_being_read.set(None if handed_down else layout)
    try:
        yield layout
    finally:
        _row_being_read.reset(token)


def is_reading() -> bool:
    """Whether this thread's model reads a row, inside `reading`."""
    return _row_being_read in copy_context()


def row_being_read() -> Layout | None:
    """The layout of the row that this thread's model reads; None outside `reading`.

    Raises: LookupError for a layout that the model was to hand down.
    """
    if not is_reading():
        return None
    layout = _row_being_read.get()
    if layout is None:
        raise LookupError("the layers do not hand extra arguments down to their attention")
    return layout
