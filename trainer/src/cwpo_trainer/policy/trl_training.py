"""Running a trainer of TRL's: log, progress, checkpoints, SIGTERM, and the end of its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from cwpo_trainer.run import process
from cwpo_trainer.run.folder import CHECKPOINTS_NAME, LOG_NAME, RunFolder
from cwpo_trainer.run.log import TrainingLog
from cwpo_trainer.run.resumption import checkpoint_to_resume
from cwpo_trainer.run.termination import SaveOnTermination, leave_stopped


def train(trainer: Any, output: RunFolder, data: Path, title: str) -> None:
    """Train from the start or a checkpoint, with log and progress on the first rank.

    Args:
        data: what --data says; a run is resumed with the same.
        title: what the progress is of.
    Exits: EXIT_CODE after a checkpoint, where SIGTERM came.
    """
    checkpoint = checkpoint_to_resume(output, data)
    _keep_adapters_in_float32(trainer.model)
    interruption = SaveOnTermination()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(interruption)
    resumed = None if checkpoint is None else str(checkpoint)
    if process.is_main():
        after = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        with TrainingLog(output.path / LOG_NAME, title, after=after) as log:
            trainer.add_callback(_Steps(log))
            trainer.train(resume_from_checkpoint=resumed)
        _finish_tracking(output.path, trainer.args.report_to, stopped=interruption.stopped)
    else:
        trainer.train(resume_from_checkpoint=resumed)
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    if evaluations:
        output.results |= {"eval_loss": evaluations[-1]["eval_loss"]}
    if interruption.stopped:
        part_ways(trainer)
        leave_stopped(trainer.state.global_step, is_main=process.is_main())


_kept_until_exit: list[Any] = []


def part_ways(trainer: Any) -> None:
    """Let the processes go on each by itself, none before all have come here.

    What the first one does alone from here on may take longer than the others can wait.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if process.world_size() > 1:
        # Freed with the last model that refers to it, a gloo group would wait for its thread, and
        # that for the interpreter's lock, which is held then. `launch.leave` ends both.
        _kept_until_exit.append(trainer)


def _keep_adapters_in_float32(model: Any) -> None:
    """Undo TRL's cast of the adapters of a 4-bit model, which loses steps of a small rate.

    At a rate of 5e-6, bfloat16 rounds a step away wherever a weight has grown past 0.002.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def _finish_tracking(folder: Path, trackers: list[str], *, stopped: bool) -> None:
    boards = folder / CHECKPOINTS_NAME / "runs"
    if boards.is_dir() and not stopped:
        boards.rename(folder / "tensorboard")
    if "wandb" in trackers:
        import wandb

        # A next training in this process, as of online rounds, is a run of its own.
        wandb.finish()


class _Steps(TrainerCallback):
    """Leads what TRL logs into our log, the learning rate as `lr`."""

    def __init__(self, log: TrainingLog) -> None:
        self._log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log.start(state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values: dict[str, float] = dict(kwargs["logs"])
        if "loss" in values:
            lr = values.pop("learning_rate")
            self._log.step(step=state.global_step, lr=lr, **values)
        elif "eval_loss" in values:
            self._log.evaluation(step=state.global_step, **values)
