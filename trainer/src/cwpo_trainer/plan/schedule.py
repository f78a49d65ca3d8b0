"""How many steps a training takes."""

from __future__ import annotations

import math
import os

from cwpo_trainer.run import process
from cwpo_trainer.settings.policy_training import PolicyTraining

_LEAST_BETWEEN_CHECKPOINTS = 200


def processes(world_size: int | None) -> int:
    """Processes that take part, or that are meant to where a run is only planned.

    Args:
        world_size: what --world-size says.
    """
    return world_size or process.world_size()


def processes_a_node(processes: int) -> int:
    """Processes on each node: as torchrun says, or else at most the 8 of a node of 8 GPUs."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(processes, 8)))


def rows_a_step(training: PolicyTraining) -> int:
    """Rows that all processes together read for one optimiser step."""
    return training.batch_size * training.gradient_accumulation * processes(training.world_size)


def total_steps(training: PolicyTraining, rows: int) -> int:
    """Optimiser steps over all epochs of a dataset of `rows` rows, or --max-steps.

    The last step of an epoch may have fewer rows.
    """
    steps_an_epoch = math.ceil(rows / rows_a_step(training))
    return training.max_steps or math.ceil(steps_an_epoch * training.epochs)


def annotator_steps(pairs: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps of an annotator over so many epochs of a dataset, or --max-steps."""
    return max_steps or max(1, round(epochs * math.ceil(pairs / batch_size)))


def steps_between_checkpoints(asked: int | None, steps: int) -> int:
    """What --save-steps says, or else a tenth of all steps; 0 for no checkpoints.

    So often a short run saves none: to begin it again costs less.
    """
    return max(_LEAST_BETWEEN_CHECKPOINTS, steps // 10) if asked is None else asked


def warmup_steps(most: int, steps: int) -> int:
    """Steps over which the learning rate rises: what --warmup-steps says, at most a tenth."""
    return min(most, steps // 10)
