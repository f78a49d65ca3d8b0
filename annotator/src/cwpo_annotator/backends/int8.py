"""Linear layers in eight-bit integers, for inference on a CPU.

Every token has a scale of its own, and every output of a layer: a score does not depend on what
else is in the batch, and one large activation spoils no other token.
"""

from __future__ import annotations

import torch

_LARGEST = 127.0
_SMALLEST_SCALE = 1e-12


class Int8Linear(torch.nn.Module):
    """What a torch.nn.Linear computes, rounded; without a gradient."""

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
