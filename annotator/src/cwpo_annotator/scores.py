"""What a model makes of items, and which of them did not fit into its memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Scores:
    """Raw scores, or embeddings, of n items, in input order.

    Args:
        values: float32, shape (n, 2) for responses a and b of pairs, (n,) for single texts,
            (n, width) for embeddings. May contain NaN and infinities, as the model returned them.
        too_large: bool, shape (n,): items that did not fit into the device's memory even alone, so
            that their values have no meaning. None if all items did.
    """

    __slots__ = ("too_large", "values")

    def __init__(
        self, values: NDArray[np.float32], too_large: NDArray[np.bool_] | None = None
    ) -> None:
        self.values = values
        self.too_large = np.zeros(len(values), np.bool_) if too_large is None else too_large

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of one or more parts, one part after the other."""
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.too_large for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, items: slice | NDArray[np.intp]) -> Scores:
        """The scores of some of the items."""
        return Scores(self.values[items], self.too_large[items])
