"""How training goes: a bar on the terminal, and a line of JSON for each step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cwpo.errors import CwpoError


class TrainingLog:
    """Writes {"step", "loss", "lr", ...} lines to `path` as training goes.

    Args:
        after: the step that a resumed run goes on after; the log up to it is kept.
    """

    def __init__(self, path: Path, title: str, *, after: int = 0) -> None:
        if after:
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= after))
        self._file = path.open("a" if after else "w", buffering=1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(title, total=None, loss="")

    def start(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._progress.update(self._task, total=steps)

    def step(self, *, step: int, loss: float, lr: float, **more: float) -> None:
        """Log one optimiser step. Raises: CwpoError when the loss is no number any more."""
        self._file.write(json.dumps({"step": step, "loss": loss, "lr": lr, **more}) + "\n")
        self._progress.update(self._task, completed=step, loss=f"loss {loss:.4f}")
        if not math.isfinite(loss):
            raise CwpoError(f"the loss became {loss} at step {step}: lower --learning-rate")

    def evaluation(self, *, step: int, **values: float) -> None:
        """Log what an evaluation after this step gave."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def __enter__(self) -> TrainingLog:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()
