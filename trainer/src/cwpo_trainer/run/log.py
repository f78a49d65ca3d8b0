"""The log of a training run: one line of JSON per step, and progress for the user."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from cwpo.errors import CwpoError
from cwpo.progress import Progress

# Figures that the user sees, by their names in the log.
_SHOWN = {
    "loss": "loss",
    "validation_loss_calibrated": "validation loss",
    "eval_loss": "evaluation loss",
}


class TrainingLog:
    """Writes {"step", "loss", "lr", ...} lines to `path` as training goes, and shows its progress.

    Args:
        work: what trains, for the user.
        after: the step that a resumed run goes on after; the log up to it is kept.
    """

    def __init__(self, path: Path, work: str, *, after: int = 0) -> None:
        self._progress = Progress(work, unit="steps", done=after)
        self._shown: dict[str, float] = {}
        if after:
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= after))
        self._file = path.open("a" if after else "w", buffering=1)

    def start(self, steps: int) -> None:
        """Set the total number of steps."""
        self._progress.update(total=steps)

    def step(self, *, step: int, loss: float, lr: float, **more: float) -> None:
        """Log one optimiser step. Raises: CwpoError if the loss is NaN or infinite."""
        self._write({"step": step, "loss": loss, "lr": lr, **more})
        if not math.isfinite(loss):
            raise CwpoError(f"the loss became {loss} at step {step}: lower --learning-rate")

    def evaluation(self, *, step: int, **values: float) -> None:
        """Log the results of an evaluation after this step."""
        self._write({"step": step, **values})

    def _write(self, line: Mapping[str, float]) -> None:
        self._file.write(json.dumps(line) + "\n")
        for name, shown in _SHOWN.items():
            if name in line:
                self._shown[shown] = line[name]
                if name != "loss":
                    lowest = self._shown.get(f"lowest {shown}", math.inf)
                    self._shown[f"lowest {shown}"] = min(lowest, line[name])
        self._progress.update(int(line["step"]), total=None, work=None, **self._shown)

    def __enter__(self) -> TrainingLog:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self._file.close()
