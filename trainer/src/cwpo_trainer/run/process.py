"""The process that training runs in: its rank, threads, seed, device and number format."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from typing import TYPE_CHECKING

from cwpo.errors import ConfigError
from cwpo_trainer.settings.mixins import DType

if TYPE_CHECKING:
    from transformers import TrainingArguments


def is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process."""
    return "RANK" in os.environ


def world_size() -> int:
    """Number of processes that train together, as set by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the one process that writes files and shows progress."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the process of a machine that does for the others what one has to do."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def expect_world_size(expected: int | None) -> None:
    """Raises: ConfigError unless that many processes train together; None expects any number."""
    if expected is not None and expected != world_size():
        raise ConfigError(
            f"{world_size()} processes train, --world-size says {expected}: start them with "
            "`torchrun --nproc-per-node ... -m cwpo_trainer.align` (or .sft, .online, "
            ".train_annotator)"
        )


def threads_each(processes: int) -> int:
    """The cores of this machine for each of so many processes, one at least."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cpus or 1) // processes)


def prepare(*, seed: int, threads: int | None) -> None:
    """Seed all random numbers, set the CPU threads, and silence output of no use to users.

    Args:
        threads: CPU threads of torch; None shares the cores among the processes of this machine.
    """
    import torch
    from datasets import disable_progress_bars
    from transformers import set_seed
    from transformers.utils import logging

    siblings = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or threads_each(siblings))
    set_seed(seed)
    disable_progress_bars()
    # They announce what a later TRL or transformers will rename; the versions are pinned.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keep transformers from spreading each batch over all GPUs that this process sees.

    Its nn.DataParallel splits no packed rows, and copies the model in every step. What is left
    unused is said on stderr.
    """
    if arguments.n_gpu <= 1:
        return
    print(
        f"1 of {arguments.n_gpu} GPUs is used: `torchrun --nproc-per-node {arguments.n_gpu} -m "
        "cwpo_trainer.align` (or .sft, .online) uses all of them",
        file=sys.stderr,
    )
    arguments._n_gpu = 1


def use_bfloat16(dtype: DType) -> bool:
    """Whether to compute in bfloat16; `auto` does where the hardware multiplies it natively."""
    import torch

    from cwpo_annotator.backends.torch.hardware.device import multiplies_bfloat16

    if dtype == "float32":
        return False
    if torch.cuda.is_available():
        is_native = multiplies_bfloat16()
        if dtype == "bfloat16" and not is_native:
            _say_slow()
        return is_native or dtype == "bfloat16"
    if dtype == "bfloat16":
        return True
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


@functools.cache
def _say_slow() -> None:
    if is_main():
        print(
            "--dtype bfloat16: this GPU only emulates it; --dtype float32 is faster",
            file=sys.stderr,
        )
