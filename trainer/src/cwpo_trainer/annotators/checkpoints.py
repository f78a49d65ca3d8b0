"""Checkpoints of a training: written to its output folder while it runs, read when it resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cwpo_trainer.run import process
from cwpo_trainer.run.folder import CHECKPOINTS_NAME, STATE_NAME

_TENSORS_NAME = "state.pt"


class Checkpoints:
    """The checkpoints of one run, each of which is of one of its named stages.

    A state is a dict of tensors and plain values. Of several ranks only the first writes; all read.

    Args:
        folder: output folder of the run.
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

    def resumed_state(self, stage: str) -> dict[str, Any] | None:
        """The state that the stage goes on from; None where it starts."""
        return self._resumed if self.resumed_in(stage) else None

    def save(self, stage: str, number: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then delete the one before; numbers grow over all stages."""
        if not process.is_main():
            return
        folder = self._folder / f"checkpoint-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "stage": stage}, folder / _TENSORS_NAME)
        # Written last: it says that the checkpoint is complete.
        (folder / STATE_NAME).write_text("{}\n")
        before, self._last = self._last, folder
        if before is not None and before != folder:
            shutil.rmtree(before)
