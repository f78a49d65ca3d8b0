"""The device that a model computes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike


def best_device() -> str:
    """The fastest device that torch sees: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def multiplies_bfloat16() -> bool:
    """Whether the GPU has arithmetic for bfloat16; older ones emulate it, slower than float32."""
    has_gpu = torch.cuda.is_available()
    return has_gpu and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def integers(
    values: ArrayLike, device: torch.device, dtype: type[np.integer[Any]] = np.int64
) -> torch.Tensor:
    """The integers on the device, in their shape.

    A GPU gets them without a wait for the work that it has begun.
    """
    on_cpu = torch.from_numpy(np.asarray(values, dtype))
    if device.type != "cuda":
        return on_cpu.to(device)
    return on_cpu.pin_memory().to(device, non_blocking=True)
