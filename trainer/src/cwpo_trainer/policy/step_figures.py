"""What is logged of training steps: means over the pairs or tokens of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StepFigures:
    """Sums that stay on the device until they are logged, so that no step waits for them."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, total: Tensor, *, count: Tensor | int) -> None:
        """Add the sum of so many values."""
        # MPS has no float64; elsewhere it counts tokens exactly.
        dtype = torch.float32 if total.device.type == "mps" else torch.float64
        total = total.detach().to(dtype)
        counted = torch.as_tensor(count, dtype=dtype, device=total.device)
        if name in self._sums:
            total, counted = total + self._sums[name][0], counted + self._sums[name][1]
        self._sums[name] = total, counted

    def take(self, accelerator: Any) -> tuple[dict[str, float], dict[str, float]]:
        """The means and the sums over all ranks, each of which calls this; then start anew."""
        if not self._sums:
            return {}, {}
        names = [*self._sums]
        stacked = torch.stack([torch.stack(pair) for pair in self._sums.values()])
        reduced: list[list[float]] = accelerator.reduce(stacked, "sum").tolist()
        self._sums = {}
        sums = {name: total for name, (total, _) in zip(names, reduced, strict=True)}
        means = {
            name: total / max(count, 1.0)
            for name, (total, count) in zip(names, reduced, strict=True)
        }
        return means, sums
