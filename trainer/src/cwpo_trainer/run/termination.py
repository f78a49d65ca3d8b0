"""Stopping a training run by SIGTERM: it saves a checkpoint after the current step and ends."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import torch
from torch import distributed
from transformers import TrainerCallback

from cwpo.exit_codes import ExitCode


class Termination:
    """Handles SIGTERM inside its block; `asked` says whether it was received."""

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


class SaveOnTermination(TrainerCallback):
    """After SIGTERM to any process, saves a checkpoint at the end of the step and stops training.

    stopped: whether training was stopped by SIGTERM.
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
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation of an epoch that was broken off to the run that resumes it."""
        if self.stopped and state.epoch % 1:
            control.should_evaluate = False
            control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no more."""
        self._termination.__exit__()

    def _any_asked(self, device: torch.device) -> bool:
        if not distributed.is_initialized():
            return self._termination.asked
        asked = torch.tensor(float(self._termination.asked), device=device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked)


def leave_stopped(step: int, *, is_main: bool) -> NoReturn:
    """End the process as STOPPED after the checkpoint of this step; the first one says so."""
    if is_main:
        print(f"stopped by SIGTERM after step {step}: continue with --resume", file=sys.stderr)
    raise SystemExit(ExitCode.STOPPED)
