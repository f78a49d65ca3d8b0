"""Long work a chunk at a time, or an item at a time, with its progress shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

from cwpo.progress import Progress
from cwpo_trainer.run import process

T = TypeVar("T")


def chunks(items: Sequence[T], size: int, *, work: str | None, unit: str) -> Iterator[Sequence[T]]:
    """The items in chunks of at most `size`; the first process shows how many are done.

    Args:
        work: what is done with them; None shows nothing. Work on a single chunk is short, and shows
            nothing either.
        unit: plural noun of the items.
    """
    if work is None or len(items) <= size or not process.is_main():
        yield from _slices(items, size)
        return
    with Progress(work, unit=unit, total=len(items)) as progress:
        for chunk in _slices(items, size):
            yield chunk
            progress.advance(len(chunk))


def counted(items: Iterable[T], size: int, *, work: str, unit: str) -> Iterator[T]:
    """The items of a source that does not say how many it has; the first process shows the count.

    Args:
        size: items from one count to the next. A source with fewer is short, and shows nothing.
        work: what is done with them; unit: plural noun of the items.
    """
    if not process.is_main():
        yield from items
        return
    progress, count = None, 0
    with ExitStack() as shown:
        for count, item in enumerate(items, start=1):
            yield item
            if count % size:
                continue
            if progress is None:
                progress = shown.enter_context(Progress(work, unit=unit, done=count))
            progress.update(count)
        if progress is not None:
            progress.update(count)


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
