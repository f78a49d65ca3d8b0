"""RMS norms in fewer passes over the activations."""

from __future__ import annotations

from typing import Any

import torch


class RmsNorm(torch.nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), as in Llama and similar models; for inference only.

    It rounds where the original does: mean and quotient are float32, the product has x's type.

    Args:
        norm: the original norm, with its weight and epsilon.
        tokens: rows of a typical input; unused here.
    """

    def __init__(self, norm: Any, tokens: int) -> None:
        super().__init__()
        self.weight: torch.Tensor = norm.weight.detach()
        self.epsilon: float = norm.variance_epsilon

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: (..., width). Returns: (..., width)."""
        if inputs.is_cuda:
            width = self.weight.shape
            return torch.nn.functional.rms_norm(inputs, width, self.weight, self.epsilon)
        wide = inputs.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().div_(inputs.shape[-1]).add_(self.epsilon).rsqrt_()
        outputs = wide * inverse if wide is inputs else wide.mul_(inverse)
        return outputs.to(inputs.dtype).mul_(self.weight)
