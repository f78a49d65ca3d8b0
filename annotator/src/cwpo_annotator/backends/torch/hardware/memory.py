"""Smaller forward passes after a device has run out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.scores import Scores

Item = TypeVar("Item", EncodedPair, EncodedText)
Score = Callable[[Sequence[Item]], NDArray[np.float32]]
T = TypeVar("T")

logger = logging.getLogger("cwpo_annotator")


class MemoryBudget:
    """The maximum number of tokens in a forward pass, halved when the device runs out of memory.

    Args:
        tokens: the initial number.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def score(self, items: Sequence[Item], score: Score[Item], shape: tuple[int, ...]) -> Scores:
        """The result of `score(items)`, with smaller passes after the device has run out of memory.

        Args:
            score: returns one row of values per item, in passes of at most `self.tokens` tokens.
            shape: that of the values of an item.
        """
        at_least = max(map(_length, items), default=0)
        values = self.fit(lambda: score(items), at_least=at_least)
        if values is not None:
            return Scores(values)
        if len(items) > 1:
            return self._longest_alone(items, score, shape)
        [item] = items
        logger.error("out of memory: an item of %d tokens does not fit even alone", item.tokens)
        return Scores(np.full((1, *shape), np.nan, np.float32), np.ones(1, np.bool_))

    def fit(self, compute: Callable[[], T], *, at_least: int) -> T | None:
        """What `compute` returns, called again with half the budget whenever memory runs out.

        Args:
            compute: makes passes of at most `self.tokens` tokens; it never returns None.
            at_least: budget below which passes get no smaller, the tokens of the longest item.
        Returns: None if memory does not suffice with that budget either.
        """
        while (result := _within_memory(compute)) is None and self.tokens > at_least:
            self._halve(at_least)
        return result

    def _halve(self, at_least: int) -> None:
        half = max(self.tokens // 2, at_least)
        logger.warning(
            "out of memory: forward passes now have %d tokens instead of %d", half, self.tokens
        )
        self.tokens = half

    def _longest_alone(
        self, items: Sequence[Item], score: Score[Item], shape: tuple[int, ...]
    ) -> Scores:
        """Score the longest items alone, down to one that fits; the others together."""
        order = sorted(range(len(items)), key=lambda at: _length(items[at]), reverse=True)
        parts = []
        for at in order:
            parts.append(self.score([items[at]], score, shape))
            if not parts[-1].too_large[0]:
                break
        rest = order[len(parts) :]
        if rest:
            parts.append(self.score([items[at] for at in rest], score, shape))
        # Item order[i] is at place i of the parts.
        return Scores.concatenate(parts)[np.argsort(order)]


def _within_memory(compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except torch.OutOfMemoryError:
        # What follows is not in this block: the error keeps the failed pass's tensors alive.
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _length(item: EncodedPair | EncodedText) -> int:
    """Tokens of the longer text, which a forward pass must hold at least."""
    return max(len(item.a), len(item.b)) if isinstance(item, EncodedPair) else len(item.ids)
