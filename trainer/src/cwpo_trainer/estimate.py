"""What alignment or SFT of a model needs, before it starts: memory a device, and time.

With P parameters of which T are trained, L layers of width h, n texts of s tokens in a forward pass
(two for each pair in alignment), c bytes for a number in the arithmetic, and N devices that share
the states (FSDP2, ZeRO-3), else N = 1; in bytes:

    weights        w P / N        w = 4, or 2 frozen in bfloat16 under LoRA; 4 bits: 0.55 of linears
    bfloat16 copy  2 P_linear     of weights in float32 that autocast multiplies with; sharded: of
                                  two layers
    gathered       w P / L * 2    sharded: two layers are whole at a time
    adapters       4 T            LoRA: r (in + out) of each linear layer but the head
    gradients      4 T / N
    optimiser      8 T / N        the two moments of AdamW
    reference      w P / N        where a second model is held
    activations    a n s c L      a = 2 * (outputs of a layer's linears) + 4 h: what backward reads;
                                  with checkpointing n s h c (L + 1)
    working        a n s c        one layer's, at once: backward, or the reference's forward
    loss          32768 c min(n * tokens of a response, 4096): the head is computed in tiles

Gradients grow while backward frees the activations: without accumulation the larger one counts.

Time is operations over the peak of the device times UTILISATION. Forward, a token costs 2 for each
weight of the linear layers and 4 s h L for attention; the head reads only tokens that carry the
loss. Backward is twice that, but once for frozen weights, and has the head's forward again, with
checkpointing the layers' too. The reference adds a forward, in every step or, precomputed, once. Of
this machine the rate of large matrix products is measured and taken for the peak.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cwpo_annotator.checkpoint import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from cwpo_trainer.commands import PolicyTraining

UTILISATION = 0.35
"""Share of a device's peak that training is taken to reach; 0.3 to 0.5 is common on GPUs."""

_TILE_TOKENS = 4096
_TILE_WIDTH = 32768
_FOUR_BITS = 0.55
_USABLE = 0.9


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: GiB of memory, and peak of dense bfloat16 in TFLOP/s as its maker states it."""

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
    linear layers of one block; lora_sides: inputs + outputs of all linear layers but the head, over
    the whole model.
    """

    parameters: int
    linear_parameters: int
    head_parameters: int
    layers: int
    width: int
    layer_outputs: int
    lora_sides: int

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """Of a model folder, from config.json alone. Raises: CheckpointError for no language model.

        The model is built without memory for its weights.
        """
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise CheckpointError(f"{folder}: no causal language model") from error
        head: Any = model.get_output_embeddings()
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        text = config.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear_parameters=sum(m.weight.numel() for m in [*linears, head]),
            head_parameters=head.weight.numel(),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            layer_outputs=sum(m.out_features for m in linears) // text.num_hidden_layers,
            lora_sides=sum(m.in_features + m.out_features for m in linears),
        )


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

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(asdict(self).values()))


def memory(
    shape: Shape,
    settings: PolicyTraining,
    *,
    texts: int,
    tokens: int,
    scored: int,
    with_reference: bool,
    sharded_over: int = 1,
) -> Memory:
    """Of a forward and backward pass over `texts` texts of `tokens` tokens on each device.

    Args:
        scored: tokens of each text that carry the loss.
        with_reference: a second model is held.
        sharded_over: devices that share weights, gradients and optimiser states.
    """
    # What is planned for is a GPU, which computes in bfloat16 unless told not to.
    bfloat16 = settings.dtype != "float32"
    number = 2 if bfloat16 else 4
    frozen = settings.lora
    of_weight = 2 if frozen and bfloat16 else 4
    weights = float(of_weight * shape.parameters)
    if settings.load_in_4bit:
        weights -= (of_weight - _FOUR_BITS) * shape.linear_parameters
    trained = settings.lora_rank * shape.lora_sides if frozen else shape.parameters
    share = 1 / sharded_over
    is_sharded = sharded_over > 1
    copied = 2 * shape.linear_parameters if bfloat16 and of_weight == 4 else 0
    of_layer = (2 * shape.layer_outputs + 4 * shape.width) * number * texts * tokens
    kept = of_layer * shape.layers
    if settings.gradient_checkpointing:
        kept = texts * tokens * shape.width * number * (shape.layers + 1)
    gradients = 4 * trained * share
    if settings.gradient_accumulation == 1:
        gradients = max(0.0, gradients - kept)
    return Memory(
        weights=weights * share,
        bfloat16_copy=copied * (min(1, 2 / shape.layers) if is_sharded else 1),
        gathered=2 * weights / shape.layers if is_sharded else 0,
        adapters=4 * trained * share if frozen else 0,
        gradients=gradients,
        optimiser=8 * trained * share,
        reference=weights * share if with_reference else 0,
        activations=kept,
        working=of_layer,
        loss=_TILE_WIDTH * number * min(texts * scored, _TILE_TOKENS),
    )


def operations(
    shape: Shape,
    settings: PolicyTraining,
    *,
    tokens: float,
    scored: float,
    length: float,
    reference: float,
) -> float:
    """Floating-point operations to train on so many tokens.

    Args:
        scored: tokens among them that the head reads.
        length: tokens of the text that a token stands in, on average over the tokens.
        reference: how often the reference reads each token; 0 without one.
    """
    # What is frozen has no gradient of its own, yet passes on that of what comes before it.
    trained = 2 if settings.lora else 3
    again = int(settings.gradient_checkpointing)
    layers = 2 * (shape.linear_parameters - shape.head_parameters) * (trained + again + reference)
    attention = 4 * length * shape.width * shape.layers * (3 + again + reference)
    adapters = 2 * settings.lora_rank * shape.lora_sides * (3 + again) if settings.lora else 0
    # Its outputs are too large to keep: backward computes them again.
    head = 2 * shape.head_parameters * (trained + 1 + reference)
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
    device: Device, shape: Shape, settings: PolicyTraining, *, most: int = 64, **pass_: Any
) -> int | None:
    """The least number of such devices, a power of 2, that share the model; None over `most`.

    Weights in 4 bits are not shared.

    Args:
        pass_: texts, tokens, scored and with_reference of `memory`.
    """
    if settings.load_in_4bit:
        most = 1
    devices = 1
    while devices <= most:
        if fits(device, memory(shape, settings, sharded_over=devices, **pass_)):
            return devices
        devices *= 2
    return None


def fits(device: Device, needed: Memory) -> bool:
    """Whether it fits, with a tenth of the memory left to the CUDA context, gaps and NCCL."""
    return needed.total <= _USABLE * device.gib * 2**30
