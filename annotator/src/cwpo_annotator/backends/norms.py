"""RMS norms in fewer passes over the activations."""

from __future__ import annotations

from typing import Any

import torch


class RmsNorm(torch.nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the norm of Llama and its kin; for inference only.

    Rounded where theirs is: the mean and the quotient are float32, the product is of x's type.

    Args:
        norm: one that holds its epsilon as they do.
        tokens: rows of a usual input, of no matter here.
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
