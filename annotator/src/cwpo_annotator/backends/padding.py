"""Texts of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, filled up at the end, and 1 where they are a text's: both (texts, longest)."""
    ids = torch.full((len(sequences), max(map(len, sequences))), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)
