"""Linear layers in 8-bit integers, for inference on a CPU.

There is one scale per token for activations and one per output channel for weights. A score
therefore does not depend on the rest of the batch, and one large activation does not affect other
tokens.
"""

from __future__ import annotations

import torch

_LARGEST = 127.0
_SMALLEST_SCALE = 1e-12


class Int8Linear(torch.nn.Module):
    """A torch.nn.Linear with rounded weights and inputs; it has no gradient."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(1).clamp_min(_SMALLEST_SCALE) / _LARGEST
        rounded = (weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = rounded.t().contiguous()
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: (..., in_features), float32. Returns: (..., out_features), float32."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        scale = tokens.abs().amax(1, keepdim=True).clamp_min(_SMALLEST_SCALE) / _LARGEST
        rounded = (tokens / scale).round_().to(torch.int8)
        outputs = torch._int_mm(rounded, self.weight).float()
        outputs.mul_(scale).mul_(self.scale)
        if self.bias is not None:
            outputs.add_(self.bias)
        return outputs.reshape(*inputs.shape[:-1], -1)


@torch.inference_mode()
def round_weights(model: torch.nn.Module) -> None:
    """Replace the linear layers below a float32 model on the CPU."""
    for name, module in model.named_children():
        if type(module) is torch.nn.Linear:
            setattr(model, name, Int8Linear(module))
        else:
            round_weights(module)
