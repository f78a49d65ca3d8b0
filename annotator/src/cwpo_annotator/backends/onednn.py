"""Linear layers whose weights oneDNN has laid out in advance, for inference on a CPU.

torch multiplies float32 matrices with MKL, which on processors of other makers leaves more than
half of their speed unused; oneDNN compiles its kernels for the processor at hand. bfloat16 goes
through oneDNN in torch already, but lays the weights out anew in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers.activations import SiLUActivation

Product = Callable[..., torch.Tensor]
# Of a module, for inputs of so many rows.
Replacement = Callable[[Any, int], torch.nn.Module]


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


@torch.inference_mode()
def lay_out(model: torch.nn.Module, tokens: int) -> None:
    """Replace the linear layers below a model on the CPU, where oneDNN proves to do their work.

    Args:
        tokens: rows of a usual input.
    """
    for name, module in model.named_children():
        kind = _replacement(module)
        replaced = _proved(kind, module, tokens) if kind is not None else None
        if replaced is not None:
            setattr(model, name, replaced)
        else:
            lay_out(module, tokens)


def _replacement(module: torch.nn.Module) -> Replacement | None:
    if type(module) is torch.nn.Linear:
        return OneDnnLinear
    layers = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    is_gated = all(type(layer) is torch.nn.Linear for layer in layers)
    silu = (torch.nn.SiLU, SiLUActivation)
    return OneDnnGatedMlp if is_gated and isinstance(getattr(module, "act_fn", 0), silu) else None


def _proved(kind: Replacement, module: torch.nn.Module, tokens: int) -> torch.nn.Module | None:
    """The replacement, if it computes what the module does."""
    weight = next(module.parameters())
    probe = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight.dtype)
    try:
        replaced = kind(module, tokens)
        outputs = replaced(probe).float()
    except (AttributeError, RuntimeError):  # built without oneDNN, or not for this type and CPU
        return None
    expected = module(probe).float()
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    is_same = (outputs - expected).norm() <= tolerance * expected.norm()
    return replaced if is_same else None
