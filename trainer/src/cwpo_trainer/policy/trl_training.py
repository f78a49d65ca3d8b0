"""Running a trainer of TRL's: log, progress, checkpoints, SIGTERM, and the end of its processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from cwpo_trainer.plan.schedule import steps_between_checkpoints
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import CHECKPOINTS_NAME, LOG_NAME, RunFolder
from cwpo_trainer.run.log import TrainingLog
from cwpo_trainer.run.resumption import checkpoint_to_resume
from cwpo_trainer.run.termination import SaveOnTermination, leave_stopped
from cwpo_trainer.settings.policy_training import PolicyStep


def train(trainer: Any, output: RunFolder, settings: PolicyStep, title: str) -> None:
    """Train from the start or a checkpoint, with log and progress on the first rank.

    Args:
        settings: of which data, --save-steps, --keep-best and --patience are read.
        title: what the progress is of.
    Exits: STOPPED after a checkpoint, where SIGTERM came.
    """
    checkpoint = checkpoint_to_resume(output, settings.data)
    _keep_adapters_in_float32(trainer.model)
    interruption = SaveOnTermination()
    trainer.remove_callback(PrinterCallback)
    for callback in (_Logging(), _Checkpoints(settings.save_steps), interruption):
        trainer.add_callback(callback)
    if settings.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    resumed = None if checkpoint is None else str(checkpoint)
    if process.is_main():
        after = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        with TrainingLog(output.path / LOG_NAME, title, after=after) as log:
            trainer.add_callback(_Steps(log))
            trainer.train(resume_from_checkpoint=resumed)
        _finish_tracking(output.path, trainer.args.report_to, stopped=interruption.stopped)
    else:
        trainer.train(resume_from_checkpoint=resumed)
    if interruption.stopped:
        part_ways(trainer)
        leave_stopped(trainer.state.global_step, is_main=process.is_main())
    output.results |= _evaluated(trainer.state, keep_best=settings.keep_best)


def _evaluated(state: Any, *, keep_best: bool) -> dict[str, JsonValue]:
    """What evaluations say of the weights that are kept; the first rank tells it too."""
    evaluations = [line for line in state.log_history if "eval_loss" in line]
    if not evaluations:
        return {}
    told, results = [], {"eval_loss": evaluations[-1]["eval_loss"]}
    if state.global_step < state.max_steps:
        results["stopped_at_step"] = state.global_step
        told.append(f"stopped early after step {state.global_step:,} of {state.max_steps:,}")
    if keep_best and state.best_global_step is not None:
        results |= {"eval_loss": state.best_metric, "best_step": state.best_global_step}
        told.append(
            f"the weights of step {state.best_global_step:,} are kept, with the lowest evaluation "
            f"loss, {state.best_metric:.4g}"
        )
    if told and process.is_main():
        print("; ".join(told), file=sys.stderr)
    return results


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


class _Logging(TrainerCallback):
    """Has a line logged before each evaluation and at the end, whatever --logging-steps says."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            control.should_log = True


class _Checkpoints(TrainerCallback):
    """Saves a checkpoint every so many steps.

    transformers does so only where no other checkpoints follow evaluations, and at the end again.
    """

    def __init__(self, save_steps: int | None) -> None:
        self._save_steps = save_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = steps_between_checkpoints(self._save_steps, state.max_steps)
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            control.should_save = True


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
