"""Linear layers whose weights oneDNN has laid out in advance, for inference on a CPU.

torch multiplies float32 matrices with MKL, which on processors of other makers leaves more than
half of their speed unused; oneDNN compiles its kernels for the processor at hand. bfloat16 goes
through oneDNN in torch already, but lays the weights out anew in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

Product = Callable[..., torch.Tensor]


class OneDnnLinear(torch.nn.Module):
    """What a torch.nn.Linear computes; for inference only, since it has no gradient.

    Args:
        tokens: rows of a usual input: the layout that is best for them is chosen.
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

        then: a function of each output, by oneDNN's name. times: (..., out_features), instead of
        it. Either is computed while the output is still in the registers.
        """
        if times is not None:
            multiply = cast(Product, torch.ops.mkldnn._linear_pointwise.binary)
            return multiply(inputs, times, self.weight, self.bias, "mul")
        multiply = cast(Product, torch.ops.mkldnn._linear_pointwise)
        return multiply(inputs, self.weight, self.bias, then, [], "")


class OneDnnGatedMlp(torch.nn.Module):
    """down(silu(gate(x)) * up(x)), the feed-forward layer of Llama and its kin.

    The wide activations are written once, by the products themselves: on a CPU, passes over them
    and the memory for their copies would take a fifth of the layer's time.
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
