"""`cwpo align` or `sft` with --sharding fsdp2 on CPUs; torchrun starts it in several processes.

usage: fsdp2_on_cpus.py align|sft FLAGS

Accelerate has FSDP for accelerators only; here it is told to use it, and how to gather weights.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.policy import preflight
from cwpo_trainer.run.launch import main

create = Trainer.create_accelerator_and_postprocess


def create_with_fsdp(trainer: Any) -> None:
    create(trainer)
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def gathered(_: Accelerator, model: Any, unwrap: bool = True) -> dict[str, Tensor]:
    """As accelerate does, but waiting for each tensor: gloo stalls where a process does not."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


if __name__ == "__main__":
    Trainer.create_accelerator_and_postprocess = create_with_fsdp
    Accelerator.get_state_dict = gathered
    preflight._need_cuda = lambda flag: None
    command = {"align": Align, "sft": Sft}[sys.argv.pop(1)]
    main(command, "fsdp2_on_cpus.py")
