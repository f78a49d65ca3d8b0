"""Replaces layers of a loaded model by faster ones that compute the same."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from transformers.activations import SiLUActivation

from cwpo_annotator.backends.torch.kernels.norms import RmsNorm
from cwpo_annotator.backends.torch.kernels.onednn import OneDnnGatedMlp, OneDnnLinear

# Builds a faster layer out of a layer, for inputs of so many rows.
Replacement = Callable[[Any, int], torch.nn.Module]


@torch.inference_mode()
def replace_layers(model: torch.nn.Module, tokens: int) -> None:
    """Replace the layers of a model for inference by faster ones, if these compute the same.

    Args:
        tokens: rows of a typical input.
    """
    for name, module in model.named_children():
        kind = _replacement(module)
        replaced = _proved(kind, module, tokens) if kind is not None else None
        if replaced is not None:
            setattr(model, name, replaced)
        else:
            replace_layers(module, tokens)


def _replacement(module: torch.nn.Module) -> Replacement | None:
    if len(signature(module.forward).parameters) != 1:
        return None  # Some norms take a gate beside the activations, and do without it at a trial.
    if hasattr(module, "variance_epsilon"):
        return RmsNorm
    if any(weight.device.type != "cpu" for weight in module.parameters()):
        return None
    if type(module) is torch.nn.Linear:
        return OneDnnLinear
    layers = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    is_gated = all(type(layer) is torch.nn.Linear for layer in layers)
    silu = (torch.nn.SiLU, SiLUActivation)
    return OneDnnGatedMlp if is_gated and isinstance(getattr(module, "act_fn", 0), silu) else None


def _proved(kind: Replacement, module: torch.nn.Module, tokens: int) -> torch.nn.Module | None:
    """The replacement, if it computes what the module does."""
    weight = next(module.parameters(), None)
    if weight is None:
        return None
    probe = torch.linspace(-1, 1, 2 * weight.shape[-1]).view(2, -1).to(weight)
    expected = module(probe).float()
    try:
        replaced = kind(module, tokens)
        outputs = replaced(probe).float()
    except (AttributeError, RuntimeError):  # built without oneDNN, or not for this type and CPU
        return None
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    is_same = (outputs - expected).norm() <= tolerance * expected.norm()
    return replaced if is_same else None
