"""An annotator whose weights the processes share: each holds a part of every one (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from cwpo.errors import ConfigError
from cwpo_annotator.backends.torch.loading import scalar_heads
from cwpo_trainer.annotators.ranks import Ranks
from cwpo_trainer.run import process


def shard(root: nn.Module, ranks: Ranks, *, bfloat16: bool) -> None:
    """Leave the process its part of each weight, on its device.

    In a call of the root, the weights of a layer are whole while it computes, and all others during
    the whole call. A backward pass sums the gradients of all processes.

    Args:
        root: a module that holds the model; nothing computes with the model but in its calls.
        bfloat16: whether weights are gathered, and computed with, in bfloat16. What is trained is
            float32, and so is a scalar head.
    Raises: ConfigError for a model without layers that can be told apart.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    exact = MixedPrecisionPolicy()
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else exact
    layers = [each for each in root.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError("--sharding fsdp2: the model's layers are not known; leave the flag out")
    parts = [(head, exact) for head in scalar_heads(root)]
    # From the inside outwards.
    parts += [(layer, mixed) for layer in reversed(layers)]
    for module, policy in (*parts, (root, mixed)):
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        # A sum, as of models that are not shared, rather than FSDP's mean.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def gather(root: nn.Module) -> None:
    """Make the weights whole again on the CPU of the first process; other processes keep none."""
    whole: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if id(weight) not in whole:
                value = whole_of(weight.detach())
                whole[id(weight)] = nn.Parameter(value, requires_grad=weight.requires_grad)
            module.register_parameter(name, whole[id(weight)])


def whole_of(value: Any) -> Any:
    """What all processes hold a part of, on the CPU of the first one.

    Other processes, which take part all the same, get a tensor on the device meta. What is not
    shared is returned as it is.
    """
    if not isinstance(value, DTensor):
        return value
    on_device: Any = value.to(value.device_mesh.device_type)
    return on_device.full_tensor().to("cpu" if process.is_main() else "meta")


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The process's part of a tensor that it has whole, as it has of another; on its device.

    Where the other is not shared, that is the tensor itself.
    """
    if not isinstance(like, DTensor):
        return value
    part = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    # A copy: what it was cut from can be freed.
    return part.clone()
