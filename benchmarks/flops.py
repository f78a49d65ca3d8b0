"""Floating-point operations of an annotator, and how many the hardware can do."""

from __future__ import annotations

import statistics
from contextlib import suppress
from typing import Any

import torch
from measurement import timed

from cwpo_annotator import Annotator
from cwpo_annotator.backends.torch.kernels.onednn import OneDnnLinear
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.encoded import EncodedPair


def utilisation(
    annotator: Annotator, pairs: list[EncodedPair], seconds: float, ceilings: list[dict[str, float]]
) -> dict[str, Any]:
    """FLOP/s of the linear layers, and with the products of attention, beside the ceilings'."""
    rows = rows_of(annotator, pairs)
    linear = 2 * linear_parameters(annotator) * sum(len(row.ids) for row in rows)
    flops = {"linear": linear, "matrix": linear + attention_flops(annotator, rows)}
    ceiling = {name: statistics.median(c[name] for c in ceilings) for name in ceilings[0]}
    return {
        "gflops": {kind: count / seconds / 1e9 for kind, count in flops.items()},
        "matrix_ceiling_gflops": {name: rate / 1e9 for name, rate in ceiling.items()},
        "share_of_ceiling": {
            name: {kind: count / seconds / rate for kind, count in flops.items()}
            for name, rate in ceiling.items()
        },
    }


@torch.inference_mode()
def matrix_ceilings(annotator: Annotator) -> dict[str, float]:
    """FLOP/s of plain matrix products of the model's shapes: torch's own, and oneDNN's on a CPU.

    A processor that oneDNN has no bfloat16 product for has torch's alone.
    """
    model = annotator.backend.model  # type: ignore[attr-defined]
    narrow, wide = model.config.hidden_size, model.config.intermediate_size
    tokens = annotator.backend.token_budget  # type: ignore[attr-defined]
    inputs = torch.randn(tokens, narrow, dtype=model.dtype, device=model.device)
    linear = torch.nn.Linear(narrow, wide, bias=False, dtype=model.dtype, device=model.device)
    layers: dict[str, torch.nn.Module] = {"torch": linear}
    if model.device.type == "cpu":
        with suppress(RuntimeError):
            layers["onednn"] = OneDnnLinear(linear, tokens)
    return {
        name: 2 * tokens * narrow * wide / seconds_each(layer, inputs)
        for name, layer in layers.items()
    }


def seconds_each(layer: torch.nn.Module, inputs: torch.Tensor) -> float:
    """Of one product; the median of groups of five, the first five groups warm up."""
    groups = [timed(lambda: [layer(inputs) for _ in range(5)])[0] for _ in range(25)]
    return statistics.median(groups[5:]) / 5


def linear_parameters(annotator: Annotator) -> int:
    model = annotator.backend.model  # type: ignore[attr-defined]
    kinds = (torch.nn.Linear, OneDnnLinear)
    layers = (m for m in model.modules() if isinstance(m, kinds))
    return sum(layer.in_features * layer.out_features for layer in layers)


def rows_of(annotator: Annotator, pairs: list[EncodedPair]) -> list[Row]:
    """What the annotator reads for these pairs at once."""
    texts = [ids for pair in pairs for ids in (pair.a, pair.b)]
    return [*annotator.backend.rows(texts)]  # type: ignore[attr-defined]


def attention_flops(annotator: Annotator, rows: list[Row]) -> int:
    """Of the two products of attention, for the keys that each token sees and no others."""
    config = annotator.backend.model.config  # type: ignore[attr-defined]
    seen = 0
    for run in (run for row in rows for run in row.runs):
        own = len(run.tokens)
        seen += own * (run.keys - own) + own * (own + 1) // 2
    width = config.num_attention_heads * config.head_dim
    return 4 * width * config.num_hidden_layers * seen
