"""How several GPUs share one model: FSDP2 or DeepSpeed ZeRO-3, as arguments of the trainer."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PretrainedConfig, TrainingArguments

from cwpo_trainer.settings.mixins import ShardingName

FSDP2: dict[str, Any] = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    # One plain model folder at the end, and in every checkpoint.
    "state_dict_type": "FULL_STATE_DICT",
}
ZERO3: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def arguments(
    sharding: ShardingName, *, checkpointing: bool, loads_once: bool = False
) -> dict[str, Any]:
    """Of SFTConfig and DPOConfig: sharding, and the gradient checkpointing that goes with it.

    Args:
        loads_once: with FSDP2, the first process alone has the weights when the model is sharded.
    """
    if sharding == "fsdp2":
        # FSDP's own checkpointing gathers a layer once in backward rather than twice.
        return {
            "fsdp": True,
            "fsdp_config": FSDP2
            | {"activation_checkpointing": checkpointing, "cpu_ram_efficient_loading": loads_once},
            "gradient_checkpointing": False,
        }
    deepspeed = {"deepspeed": ZERO3} if sharding == "zero3" else {}
    return {**deepspeed, "gradient_checkpointing": checkpointing}


class NoReference(nn.Module):
    """What TRL is given as the reference of a loss that has none, where it would load one.

    Under FSDP it does so in every process, only to drop it again.
    """

    config = PretrainedConfig()


def is_fsdp2(arguments: TrainingArguments) -> bool:
    """Whether a trainer will use FSDP2: by its arguments, or as `accelerate launch` has it."""
    if arguments.fsdp_plugin_args is not None:
        return bool(arguments.fsdp_plugin_args["fsdp_version"] == 2)
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return launched and os.environ.get("FSDP_VERSION") == "2"


def shard_reference(model: Any, accelerator: Accelerator) -> None:
    """Shard a model that is only read as the policy will be: layer by layer.

    TRL's own way gathers all of it for each forward pass, and has each process load it.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    before = dict(vars(plugin))
    fsdp2_prepare_model(accelerator, model.requires_grad_(False))
    # The policy may have layers of another class.
    vars(plugin).update(before)
