"""FSDP2 for the trainers of TRL on CPUs.

Accelerate has FSDP for accelerators only; here it is told to use it, and how to gather weights.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer
from trl.trainer import dpo_trainer

from cwpo_trainer.policy import preflight

create = Trainer.create_accelerator_and_postprocess
load = dpo_trainer.create_model_from_path


def allow_fsdp2() -> None:
    """Have --sharding fsdp2 do in this process what it does on GPUs."""
    Trainer.create_accelerator_and_postprocess = create_with_fsdp
    Accelerator.get_state_dict = gathered
    dpo_trainer.create_model_from_path = load_and_say_so
    preflight._need_cuda = lambda flag: None


def load_and_say_so(*args: Any, **kwargs: Any) -> Any:
    print("TRL loads a reference")
    return load(*args, **kwargs)


def create_with_fsdp(trainer: Any) -> None:
    create(trainer)
    state = trainer.accelerator.state
    # Each AcceleratorState() takes it from there again.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def gathered(_: Accelerator, model: Any, unwrap: bool = True) -> dict[str, Tensor]:
    """As accelerate does, but waiting for each tensor: gloo stalls where a process does not."""
    state = model.state_dict()
    if all(isinstance(value, DTensor) for value in state.values()):
        print("gathered its shares of all weights")
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state.items()
    }
