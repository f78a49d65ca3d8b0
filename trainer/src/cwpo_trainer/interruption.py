"""Stopping a training run without losing it: SIGTERM saves a checkpoint, --resume goes on from it.

A run goes on only as what it was: the same settings, data and number of processes.
"""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from transformers import TrainerCallback

from cwpo.errors import ConfigError
from cwpo_trainer import runtime
from cwpo_trainer.record import Output, last_checkpoint

if TYPE_CHECKING:
    from cwpo_trainer.commands import PolicyTraining, TrainAnnotator

EXIT_CODE = 75
"""Of a process that SIGTERM stopped after it saved a checkpoint: sysexits' "try again later"."""

_STARTED_NAME = "started.json"
# They change nothing of what is computed.
_FREE = {
    "config",
    "dry_run",
    "resume",
    "threads",
    "world_size",
    "save_steps",
    "report_to",
    "push_to_hub",
    "splits",
}


def checkpoint_to_resume(settings: PolicyTraining | TrainAnnotator, output: Output) -> Path | None:
    """The checkpoint that --resume goes on from; None where the run starts.

    What the run consists of is noted at its start and compared here.
    Raises: ConfigError naming the first setting that is another than at the start.
    """
    started = output.folder / _STARTED_NAME
    checkpoint = last_checkpoint(output.folder)
    now = _identity(settings, output)
    if checkpoint is None:
        if runtime.is_main():
            started.write_text(json.dumps(now))
        return None
    before = json.loads(started.read_text())
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"--resume: {name} was {before.get(name)} at the start of this run and is {value} "
                f"now: set it back, or remove {output.folder} to start anew"
            )
    return checkpoint


def _identity(settings: PolicyTraining | TrainAnnotator, output: Output) -> dict[str, Any]:
    same = {name: value for name, value in output.settings.items() if name not in _FREE}
    # Labelled pairs may come from the Hub, where the name has to do.
    if Path(settings.data).is_file():
        with Path(settings.data).open("rb") as data:
            same["sha256 of data"] = hashlib.file_digest(data, "sha256").hexdigest()
    return {**same, "number of processes": runtime.world_size()}


class Termination:
    """Listens for SIGTERM inside the block; asked: whether it came."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Termination:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True


class SaveOnTerm(TrainerCallback):
    """After SIGTERM to any process: a checkpoint at the end of the step, and no further step.

    stopped: whether training ended early for it.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._termination = Termination()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen."""
        self._termination.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let all processes save after the same step."""
        if state.global_step < state.max_steps and self._any_asked(args.device):
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no more."""
        self._termination.__exit__()

    def _any_asked(self, device: torch.device) -> bool:
        if not distributed.is_initialized():
            return self._termination.asked
        asked = torch.tensor(float(self._termination.asked), device=device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked)
