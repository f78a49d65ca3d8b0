"""A device that runs out of memory: smaller batches, and on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cwpo_annotator.backends.base import OUT_OF_MEMORY, EncodedPair, EncodedText

Item = TypeVar("Item", EncodedPair, EncodedText)
Score = Callable[[Sequence[Item]], NDArray[np.float32]]

logger = logging.getLogger("cwpo_annotator")


class MemoryBudget:
    """The tokens of a forward pass: half as many each time that the device cannot hold them.

    Args:
        tokens: to begin with.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def score(self, items: Sequence[Item], score: Score[Item]) -> NDArray[np.float32]:
        """What `score(items)` gives, which reads `tokens` anew at each call.

        Returns: shape (n, ...); OUT_OF_MEMORY for an item that the device cannot hold even alone.
        """
        while (scores := _within_memory(items, score)) is None:
            longest = max(items, key=_length)
            if self.tokens > _length(longest):
                self._halve(_length(longest))
            elif len(items) == 1:
                logger.error(
                    "out of memory: an item of %d tokens does not fit even alone", longest.tokens
                )
                shape = (1, 2) if isinstance(longest, EncodedPair) else (1,)
                return np.full(shape, OUT_OF_MEMORY, np.float32)
            else:
                return self._without_giants(items, score)
        return scores

    def _halve(self, at_least: int) -> None:
        half = max(self.tokens // 2, at_least)
        logger.warning("out of memory: %d tokens a forward pass, no more %d", half, self.tokens)
        self.tokens = half

    def _without_giants(self, items: Sequence[Item], score: Score[Item]) -> NDArray[np.float32]:
        """Score the longest items alone, down to one that fits; the others together."""
        order = sorted(range(len(items)), key=lambda at: _length(items[at]), reverse=True)
        done: dict[int, NDArray[np.float32]] = {}
        for at in order:
            done[at] = self.score([items[at]], score)
            if np.isfinite(done[at]).all():
                break
        rest = [at for at in range(len(items)) if at not in done]
        if rest:
            scores = self.score([items[at] for at in rest], score)
            done |= {at: scores[[row]] for row, at in enumerate(rest)}
        return np.concatenate([done[at] for at in range(len(items))])


def _within_memory(items: Sequence[Item], score: Score[Item]) -> NDArray[np.float32] | None:
    try:
        return score(items)
    except torch.OutOfMemoryError:
        # What follows is not in this block: the error keeps the failed pass's tensors alive.
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _length(item: EncodedPair | EncodedText) -> int:
    """Tokens of the longer text: what a pass has to hold at the least."""
    return max(len(item.a), len(item.b)) if isinstance(item, EncodedPair) else len(item.ids)
