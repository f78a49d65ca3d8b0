"""Memory per device and time that a training needs, estimated before it starts.

Symbols: P parameters, of which T are trained; L layers of width h; t tokens in a forward pass, u of
them responses' (a packed row, or a padded batch of two texts for each pair in alignment); c bytes
per number in forward and backward passes; V words in the vocabulary; N devices that shard the
states (FSDP2, ZeRO-3), otherwise N = 1. In bytes:

    weights        w P / N        w = 4, or 2 if frozen in bfloat16 (LoRA of policies); in 4 bits
                                  0.55 for the weights of linear layers
    bfloat16 copy  2 P_linear     float32 weights are cast by autocast; if sharded, two layers only
    gathered       w P / L * 2    if sharded: two layers are complete at a time
    adapters       4 T            LoRA: r (in + out) of each linear layer of --lora-targets
    gradients      4 T / N
    optimiser      8 T / N        the two moments of AdamW
    reference      w P / N        if a second model is held; in bfloat16 w is 2 if it is sharded, or
                                  for the weights of linear layers, without a tied head
    activations    a t L          a = 2 c (outputs of a layer's linear layers) + 18 h, 12 h under
                                  LoRA, 40 h where autocast casts, read by the backward pass; with
                                  checkpointing t h c (L + 1)
    working        a t            of one layer, in the backward or the reference's forward pass
    loss           12 min(u V, M) + h c u, where M logits exist at a time, in float32 and thrice;
                                  of padded batches 32768 c min(u, 4096): their head has tiles
    process                       on a CPU: libraries and data, as much as this process has now, and
                                  FIRST_PASSES
    merging        4 P            on a CPU, LoRA: the base model, loaded again to be merged with its
                                  adapters when activations are gone

The backward pass frees activations while gradients grow: without gradient accumulation, only the
larger of the two counts; the same holds for what is merged.

Time is the number of operations over UTILISATION times the peak rate of the device. In the forward
pass, a token takes 2 operations for each weight of the linear layers, and 4 h L for each token that
it attends to; the head reads only tokens that contribute to the loss. The backward pass takes twice
that, but once for frozen weights; it repeats the head's forward pass, unless rows are packed and
the head is frozen, and with checkpointing those of the layers. The reference adds a forward pass in
every step, or only once if it is precomputed. For the peak rate of this machine, the rate of large
matrix products is measured.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cwpo_annotator.backends.torch.loading import scalar_heads
from cwpo_annotator.backends.torch.log_probs import logits_at_a_time
from cwpo_annotator.checkpoint import CheckpointError
from cwpo_trainer.lora import ALL_LINEAR, is_target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

UTILISATION = 0.35
"""Share of a device's peak rate that training is assumed to reach; 0.3 to 0.5 is common on GPUs."""

FIRST_PASSES = 150 * 2**20
"""What libraries load, and keep as their own work space, with the first passes: measured."""

_TILE_TOKENS = 4096
_TILE_WIDTH = 32768
_FOUR_BITS = 0.55
_USABLE = 0.9


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: memory in GiB, and the maker's figure of its dense bfloat16 peak in TFLOP/s."""

    name: str
    gib: float
    tflops: float


DEVICES = (
    Device("RTX 4090", 24, 165),
    Device("L40S", 48, 362),
    Device("A100 40 GB", 40, 312),
    Device("A100 80 GB", 80, 312),
    Device("H100 80 GB", 80, 989),
    Device("H200", 141, 989),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model its memory depends on.

    linear_parameters: of all linear layers, the head with them; layer_outputs: outputs of all
    linear layers of one block; lora_sides: inputs + outputs of the linear layers that adapters are
    for, over the whole model; is_tied: the head has the weights of the embedding.
    """

    parameters: int
    linear_parameters: int
    head_parameters: int
    layers: int
    width: int
    layer_outputs: int
    lora_sides: int
    is_tied: bool = False

    @classmethod
    def read(cls, folder: Path, lora_targets: Sequence[str] = ALL_LINEAR) -> Shape:
        """Of a model folder, from config.json alone. Raises: CheckpointError for no language model.

        The model is built without memory for its weights.
        """
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise CheckpointError(f"{folder}: not a causal language model") from error
        return cls.of(model, lora_targets)

    @classmethod
    def of(cls, model: Any, lora_targets: Sequence[str] = ALL_LINEAR) -> Shape:
        """Of a language model, or one with a scalar head; it may have no memory for its weights."""
        head = model.get_output_embeddings() or scalar_heads(model)[-1]
        named = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        linears = [*named.values()]
        adapted = [module for name, module in named.items() if is_target(name, lora_targets)]
        text = model.config.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear_parameters=sum(m.weight.numel() for m in [*linears, head]),
            head_parameters=head.weight.numel(),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            layer_outputs=sum(m.out_features for m in linears) // text.num_hidden_layers,
            lora_sides=sum(m.in_features + m.out_features for m in adapted),
            is_tied=head.weight is model.get_input_embeddings().weight,
        )


@dataclass(frozen=True, slots=True)
class Method:
    """How a model is trained, as far as memory and time depend on it.

    bfloat16: passes compute in it; lora_rank: None where all weights are trained; in_4bit: frozen
    weights are held in 4 bits; checkpointing: activations are computed again in backward;
    accumulation: batches a step; packed: texts are read in packed rows rather than padded batches;
    frozen_float32: frozen weights are float32 whatever passes compute in.
    """

    bfloat16: bool = True
    lora_rank: int | None = None
    in_4bit: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    packed: bool = True
    frozen_float32: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each device at the peak, by what they hold."""

    weights: float
    bfloat16_copy: float
    gathered: float
    adapters: float
    gradients: float
    optimiser: float
    reference: float
    activations: float
    working: float
    loss: float
    process: float = 0
    merging: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(asdict(self).values()))


def memory(
    shape: Shape,
    method: Method,
    *,
    tokens: int,
    scored: int,
    with_reference: bool,
    sharded_over: int = 1,
    on_cpu: bool = False,
) -> Memory:
    """Of a forward and backward pass over so many tokens on each device.

    Args:
        scored: tokens among them that carry the loss.
        with_reference: a second model is held.
        sharded_over: devices that share weights, gradients and optimiser states.
    """
    number = 2 if method.bfloat16 else 4
    frozen = method.lora_rank is not None
    of_weight = _bytes_of_weight(method)
    weights = loaded_policy(shape, method)
    trained = shape.parameters if method.lora_rank is None else method.lora_rank * shape.lora_sides
    share = 1 / sharded_over
    is_sharded = sharded_over > 1
    reference = loaded_reference(shape, method, is_sharded=is_sharded)
    copied = 2 * shape.linear_parameters if method.bfloat16 and of_weight == 4 else 0
    # In float32: norms, and what is added up past the layers; autocast keeps its casts of it, too.
    between = 10 if copied else 3 if frozen else 4.5
    of_layer = (2 * shape.layer_outputs * number + 4 * between * shape.width) * tokens
    kept = of_layer * shape.layers
    if method.checkpointing:
        kept = tokens * shape.width * number * (shape.layers + 1)
    gradients = 4 * trained * share
    if method.accumulation == 1:
        gradients = max(0.0, gradients - kept)
    loss = _loss_bytes(shape, method, scored, number, "cpu" if on_cpu else "cuda")
    merged = 4 * shape.parameters if frozen and on_cpu else 0
    return Memory(
        weights=weights * share,
        bfloat16_copy=copied * (min(1, 2 / shape.layers) if is_sharded else 1),
        gathered=2 * weights / shape.layers if is_sharded else 0,
        adapters=4 * trained * share if frozen else 0,
        gradients=gradients,
        optimiser=8 * trained * share,
        reference=reference * share if with_reference else 0,
        activations=kept,
        working=of_layer,
        loss=loss,
        process=psutil.Process().memory_info().rss + FIRST_PASSES if on_cpu else 0,
        merging=max(0.0, merged - kept - of_layer - loss),
    )


def loaded_policy(shape: Shape, method: Method) -> float:
    """Bytes of the policy's weights as they are loaded, and trained."""
    of_weight = _bytes_of_weight(method)
    weights = float(of_weight * shape.parameters)
    if method.in_4bit:
        weights -= (of_weight - _FOUR_BITS) * shape.linear_parameters
    return weights


def loaded_reference(shape: Shape, method: Method, *, is_sharded: bool) -> float:
    """Bytes of the weights of a reference that is a second model, as they are loaded."""
    if method.lora_rank is not None or not method.bfloat16:
        return loaded_policy(shape, method)
    if is_sharded:
        return 2.0 * shape.parameters
    in_bfloat16 = shape.linear_parameters - (shape.head_parameters if shape.is_tied else 0)
    return 4.0 * shape.parameters - 2.0 * in_bfloat16


def _bytes_of_weight(method: Method) -> int:
    is_halved = method.lora_rank is not None and method.bfloat16 and not method.frozen_float32
    return 2 if is_halved else 4


def _loss_bytes(shape: Shape, method: Method, scored: int, number: int, device_type: str) -> float:
    vocabulary = shape.head_parameters // shape.width
    if not method.packed:
        return min(_TILE_WIDTH, vocabulary) * number * min(scored, _TILE_TOKENS)
    logits = min(scored * vocabulary, logits_at_a_time(device_type))
    return 3 * 4 * logits + shape.width * number * scored


def reading_operations(
    shape: Shape, method: Method, *, tokens: float, scored: float, length: float
) -> float:
    """Floating-point operations to read so many tokens, without training; see `operations`."""
    layers = 2 * (shape.linear_parameters - shape.head_parameters)
    attention = 4 * length * shape.width * shape.layers
    adapters = 2 * (method.lora_rank or 0) * shape.lora_sides
    return tokens * (layers + attention + adapters) + scored * 2 * shape.head_parameters


def operations(
    shape: Shape,
    method: Method,
    *,
    tokens: float,
    scored: float,
    length: float,
    reference: float,
) -> float:
    """Floating-point operations to train on so many tokens.

    Args:
        scored: tokens among them that the head reads.
        length: tokens that a token attends to, on average over the tokens.
        reference: how often the reference reads each token; 0 without one.
    """
    # What is frozen has no gradient of its own, yet passes on that of what comes before it.
    trained = 3 if method.lora_rank is None else 2
    again = int(method.checkpointing)
    layers = 2 * (shape.linear_parameters - shape.head_parameters) * (trained + again + reference)
    attention = 4 * length * shape.width * shape.layers * (3 + again + reference)
    adapters = 2 * (method.lora_rank or 0) * shape.lora_sides * (3 + again)
    # Its outputs are too large to keep: backward computes them again, or has nothing left to do.
    passes = 2 if method.packed and method.lora_rank is not None else trained + 1
    head = 2 * shape.head_parameters * (passes + reference)
    return tokens * (layers + attention + adapters) + scored * head


def measured_rate(dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products on this machine's GPU or CPU, measured now."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    width = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(width, width, dtype=dtype, device=device) for _ in range(2))
    products, elapsed = 1, 0.0
    # More of them each time, until starting and waiting no longer count.
    while elapsed < 0.15:
        products *= 2
        started = time.perf_counter()
        for _ in range(products):
            product = left @ right
        product[0, 0].item()
        elapsed = time.perf_counter() - started
    return 2.0 * width**3 * products / elapsed


def devices_needed(
    device: Device, shape: Shape, method: Method, *, most: int = 64, **pass_: Any
) -> int | None:
    """The least number of such devices, a power of 2, that share the model; None over `most`.

    Weights in 4 bits are not shared.

    Args:
        pass_: tokens, scored and with_reference of `memory`.
    """
    if method.in_4bit:
        most = 1
    devices = 1
    while devices <= most:
        if fits(device, memory(shape, method, sharded_over=devices, **pass_)):
            return devices
        devices *= 2
    return None


def fits(device: Device, needed: Memory) -> bool:
    """Whether it fits, with a tenth of the memory left to the CUDA context, gaps and NCCL."""
    return needed.total <= _USABLE * device.gib * 2**30
