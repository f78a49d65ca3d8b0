"""Linear layers whose weights oneDNN has laid out in advance, for inference on a CPU.

torch multiplies float32 matrices with MKL, which on processors of other makers leaves more than
half of their speed unused; oneDNN compiles its kernels for the processor at hand. bfloat16 goes
through oneDNN in torch already, but lays the weights out anew in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch


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

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: (..., in_features). Returns: (..., out_features)."""
        multiply = cast(Callable[..., torch.Tensor], torch.ops.mkldnn._linear_pointwise)
        return multiply(inputs, self.weight, self.bias, "none", [], "")


@torch.inference_mode()
def lay_out(model: torch.nn.Module, tokens: int) -> None:
    """Replace the linear layers below a model on the CPU, where oneDNN proves to do their work.

    Args:
        tokens: rows of a usual input.
    """
    for name, module in model.named_children():
        if type(module) is not torch.nn.Linear:
            lay_out(module, tokens)
        elif (replaced := _replaced(module, tokens)) is not None:
            setattr(model, name, replaced)


def _replaced(linear: torch.nn.Linear, tokens: int) -> OneDnnLinear | None:
    probe = torch.linspace(-1, 1, 2 * linear.in_features).view(2, -1).to(linear.weight.dtype)
    try:
        replaced = OneDnnLinear(linear, tokens)
        outputs = replaced(probe).float()
    except (AttributeError, RuntimeError):  # built without oneDNN, or not for this type and CPU
        return None
    expected = linear(probe).float()
    tolerance = 1e-4 if linear.weight.dtype == torch.float32 else 2e-2
    is_same = (outputs - expected).norm() <= tolerance * expected.norm()
    return replaced if is_same else None
