"""Texts of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch


def padded(
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str,
    *,
    side: Literal["left", "right"] = "right",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of texts padded to one length, and the attention mask (1 for a text's tokens).

    Args:
        side: where to pad; with padding on the left all texts end at the same position, so that
            generation can continue them.
    Returns: two integer tensors of shape (texts, longest).
    """
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if side == "left" else 0
        place = slice(start, start + len(sequence))
        ids[row, place] = torch.as_tensor(sequence)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
