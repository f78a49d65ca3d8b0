"""States of a training run in work: written to its output folder, and read to go on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cwpo_trainer import runtime
from cwpo_trainer.record import CHECKPOINTS_NAME, STATE_NAME

_TENSORS_NAME = "state.pt"


class Checkpoints:
    """The checkpoints of one run, which goes through named stages, each with steps of its own.

    A state is a dict of tensors and plain values. Of several ranks only the first writes; all read.

    Args:
        folder: of the run's output.
        resumed: the checkpoint to go on from; None where the run starts.
    """

    def __init__(self, folder: Path, resumed: Path | None) -> None:
        self._folder = folder / CHECKPOINTS_NAME
        self._last = resumed
        self._resumed: dict[str, Any] | None = None
        if resumed is not None:
            self._resumed = torch.load(
                resumed / _TENSORS_NAME, map_location="cpu", weights_only=True
            )

    def resumed_in(self, stage: str) -> bool:
        """Whether the run goes on in this stage."""
        return self._resumed is not None and self._resumed["stage"] == stage

    def take(self, stage: str) -> dict[str, Any] | None:
        """The state to go on from; None where the stage starts."""
        return self._resumed if self.resumed_in(stage) else None

    def save(self, stage: str, number: int, state: dict[str, Any]) -> None:
        """Write the state under a number that grows over all stages; the one before then goes."""
        if not runtime.is_main():
            return
        folder = self._folder / f"checkpoint-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "stage": stage}, folder / _TENSORS_NAME)
        # This file makes the checkpoint a whole one.
        (folder / STATE_NAME).write_text("{}\n")
        before, self._last = self._last, folder
        if before is not None and before != folder:
            shutil.rmtree(before)
