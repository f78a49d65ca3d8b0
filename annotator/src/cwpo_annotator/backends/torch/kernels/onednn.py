"""Linear layers whose weights are converted to oneDNN's layout in advance, for inference on a CPU.

torch multiplies float32 matrices with MKL, which reaches less than half of the speed of processors
from other makers than Intel; oneDNN compiles its kernels for the processor at hand. With bfloat16,
torch uses oneDNN already, but converts the weights to its layout in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

Product = Callable[..., torch.Tensor]


class OneDnnLinear(torch.nn.Module):
    """A torch.nn.Linear computed by oneDNN; for inference only, since it has no gradient.

    Args:
        tokens: rows of a typical input, for which the layout of the weights is chosen.
    """

    def __init__(self, linear: torch.nn.Linear, tokens: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), tokens)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(
        self, inputs: torch.Tensor, then: str = "none", times: torch.Tensor | None = None
    ) -> torch.Tensor:
        """inputs: (..., in_features). Returns: (..., out_features).

        Args:
            then: oneDNN's name of a function to apply to each output.
            times: factors of the outputs, shape (..., out_features), instead of a function. Either
                is computed while the outputs are still in registers.
        """
        if times is not None:
            multiply = cast(Product, torch.ops.mkldnn._linear_pointwise.binary)
            return multiply(inputs, times, self.weight, self.bias, "mul")
        multiply = cast(Product, torch.ops.mkldnn._linear_pointwise)
        return multiply(inputs, self.weight, self.bias, then, [], "")


class OneDnnGatedMlp(torch.nn.Module):
    """down(silu(gate(x)) * up(x)), the feed-forward layer of Llama and similar models.

    The matrix products write the wide activations once. On a CPU, more passes over them, and the
    memory for copies, would take a fifth of the layer's time.
    """

    def __init__(self, mlp: torch.nn.Module, tokens: int) -> None:
        super().__init__()
        self.gate = OneDnnLinear(cast(torch.nn.Linear, mlp.gate_proj), tokens)
        self.up = OneDnnLinear(cast(torch.nn.Linear, mlp.up_proj), tokens)
        self.down = OneDnnLinear(cast(torch.nn.Linear, mlp.down_proj), tokens)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: (..., width). Returns: (..., width)."""
        outputs: torch.Tensor = self.down(self.up(inputs, times=self.gate(inputs, "swish")))
        return outputs
