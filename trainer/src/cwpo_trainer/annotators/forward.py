"""Forward passes of annotators in training: their size, number format and results."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.plan.row_sizes import row_tokens

H = TypeVar("H", bound=Hashable)


def token_budget(device: torch.device) -> int:
    """Tokens of a forward pass, padding included; it sets memory and speed, not the result."""
    return row_tokens(device.type)


def most_together(budget: int, device: torch.device) -> int:
    """Tokens that texts with a common beginning may have in a row, for this token budget.

    To read a long prompt again for some of its responses costs more than a longer row.
    """
    return 2 * budget if device.type == "cpu" else budget


def mixed_precision(model: Any, *, bfloat16: bool) -> AbstractContextManager[None]:
    """Computes the model's matrix products in bfloat16 where that is asked for."""
    return torch.autocast(model.device.type, torch.bfloat16) if bfloat16 else nullcontext()


def of_a_and_b(row: Row, of_texts: Tensor) -> Tensor:
    """Values of the texts of a row of pairs, as columns a and b, in the order of `pairs_in`."""
    # Texts 2i and 2i + 1 are a and b of pair i.
    order = torch.tensor(row.texts).argsort()
    return of_texts[order.to(of_texts.device)].view(-1, 2)


def pairs_in(row: Row) -> list[int]:
    """The indices of the pairs of a row of pairs, ascending."""
    return [text // 2 for text in sorted(row.texts)[::2]]


def distinct(texts: Sequence[H]) -> tuple[list[H], list[int]]:
    """Each text once, and the place among them of each that was given."""
    numbers: dict[H, int] = {}
    places = [numbers.setdefault(text, len(numbers)) for text in texts]
    return [*numbers], places


def pair_width(pair: EncodedPair) -> int:
    """Tokens that a pair takes in a padded batch of pairs that are no longer."""
    return 2 * max(len(pair.a), len(pair.b))


def score_margins(scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Score of a less that of b, shape (pairs,), from what each pass gave, shape (its pairs, 2)."""
    margins = [part[:, 0] - part[:, 1] for part in scores]
    return np.concatenate([np.empty(0), *margins]).astype(np.float64)
