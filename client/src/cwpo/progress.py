"""Progress of long work: a bar on a terminal; otherwise, as in a log file, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows the progress of some work on stderr, from `with` to the end of its block.

    On a terminal it is a bar. Elsewhere it is a line at the first update, then one at most every
    `seconds`, and one at the end:

        annotate: 12,000 of 40,000 rows, 1,234 rows/s, 23 s left
        train: 120 of 560 steps, loss 0.6512, 1.1 steps/s, 6 min 40 s left

    Args:
        work: name of the work, such as "annotate".
        unit: plural noun of what is counted, such as "rows" or "steps".
        total: number of units in all; None if it is not known yet.
        done: units that an earlier, resumed run has done; they do not count in the rate.
        seconds: minimum time between two lines.
        stream: where to write; stderr by default.
        clock: returns the time in seconds.
        is_quiet: show nothing at all.
    """

    def __init__(
        self,
        work: str,
        *,
        unit: str,
        total: int | None = None,
        done: int = 0,
        seconds: float = SECONDS_BETWEEN_LINES,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_quiet: bool = False,
    ) -> None:
        self._state = _State(work, unit, done, total, {})
        stream = stream or sys.stderr
        self._display: _Display
        if is_quiet:
            self._display = _Nothing()
        else:
            self._display = _Bar(stream) if stream.isatty() else _Lines(stream, seconds, clock)

    def update(
        self,
        done: int | None = None,
        *,
        total: int | None = None,
        work: str | None = None,
        **figures: float,
    ) -> None:
        """Show the units done in all, and figures such as `loss=0.65`; None keeps a value."""
        if total is not None:
            self._state.total = total
        if work is not None:
            self._state.work = work
        self.advance(0 if done is None else done - self._state.done, **figures)

    def advance(self, count: int = 1, **figures: float) -> None:
        """Show that `count` more units are done."""
        self._state.done += count
        self._state.figures |= figures
        self._display.show(self._state)

    def __enter__(self) -> Progress:
        self._display.open(self._state)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.close(self._state)


@contextmanager
def shown(
    progress: Progress | bool | None, work: str, *, unit: str, total: int | None = None
) -> Iterator[Progress]:
    """What shows the progress of some work: a Progress that is given, or for True a new one.

    For False or None it shows nothing. The arguments are those of Progress.
    """
    if isinstance(progress, Progress):
        progress.update(total=total, work=work)
        yield progress
        return
    with Progress(work, unit=unit, total=total, is_quiet=not progress) as new:
        yield new


@dataclass
class _State:
    work: str
    unit: str
    done: int
    total: int | None
    figures: dict[str, float]

    def told_figures(self) -> list[str]:
        return [f"{name} {value:.4g}" for name, value in self.figures.items()]

    def told(self) -> str:
        of_total = "" if self.total is None else f" of {self.total:,}"
        return ", ".join(
            [f"{self.work}: {self.done:,}{of_total} {self.unit}", *self.told_figures()]
        )


class _Display(Protocol):
    def open(self, state: _State) -> None: ...

    def show(self, state: _State) -> None: ...

    def close(self, state: _State) -> None: ...


class _Nothing:
    """No display."""

    def open(self, state: _State) -> None:
        pass

    def show(self, state: _State) -> None:
        pass

    def close(self, state: _State) -> None:
        pass


class _Bar:
    """A bar of rich's, drawn anew several times a second."""

    def __init__(self, stream: TextIO) -> None:
        # Imported here: only a terminal needs it.
        import rich.console
        import rich.progress

        self._bars = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description:<12}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[more]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(file=stream),
        )

    def open(self, state: _State) -> None:
        self._task = self._bars.add_task(
            state.work, completed=state.done, total=state.total, more=state.unit
        )
        self._bars.start()

    def show(self, state: _State) -> None:
        self._bars.update(
            self._task,
            description=state.work,
            completed=state.done,
            total=state.total,
            more=" ".join([state.unit, *state.told_figures()]),
        )

    def close(self, state: _State) -> None:
        self._bars.stop()


class _Lines:
    """A plain line now and then; its rate is that since the line before, the last one's overall."""

    def __init__(self, stream: TextIO, seconds: float, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._seconds = seconds
        self._clock = clock
        self._last = ""

    def open(self, state: _State) -> None:
        self._opened = self._since = (self._clock(), state.done)

    def show(self, state: _State) -> None:
        now = self._clock()
        if not self._last or now - self._since[0] >= self._seconds:
            self._print(state, now, self._since)
            self._since = (now, state.done)

    def close(self, state: _State) -> None:
        if self._last and state.told() != self._last:
            self._print(state, self._clock(), self._opened)

    def _print(self, state: _State, now: float, since: tuple[float, int]) -> None:
        self._last = state.told()
        told = [self._last]
        seconds, done = now - since[0], state.done - since[1]
        if seconds > 0 and done > 0:
            rate = done / seconds
            told.append(f"{_rate(rate)} {state.unit}/s")
            if state.total is not None and state.total > state.done:
                told.append(f"{duration((state.total - state.done) / rate)} left")
        print(", ".join(told), file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A length of time in words: "23 s", "6 min 40 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
