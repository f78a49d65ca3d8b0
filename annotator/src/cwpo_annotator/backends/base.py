"""What every scoring backend offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import CwpoError

# A NaN whose payload says why there is no score: the device's memory cannot hold the item.
OUT_OF_MEMORY = np.array(0x7FC00C0D, np.uint32).view(np.float32)


class BackendUnavailableError(CwpoError):
    """Nothing can be scored at the moment; the same request may succeed later."""


# Not frozen: to make one would take four times as long, and a service makes one a triplet.
@dataclass(slots=True)
class EncodedText:
    """The token ids of one prompt with one response.

    start: where the response starts, known where the encoder marks it.
    """

    ids: Sequence[int]
    truncated: bool = False
    start: int = 0

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return len(self.ids)


@dataclass(slots=True)
class EncodedPair:
    """The token ids of one prompt with either response.

    The first `shared` ids of a and b are the same. start: where the responses start, at most
    `shared`, known where the encoder marks it.
    """

    a: Sequence[int]
    b: Sequence[int]
    shared: int = 0
    truncated: bool = False
    start: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of both texts."""
        return len(self.a) + len(self.b)


class Backend(Protocol):
    """Scores token ids with one loaded model. Called from one thread at a time."""

    name: str
    device: str
    dtype: str

    # Tokens a call that keep it busy: with more, others would only wait the longer.
    batch_tokens: int

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        """Raw scores of a and b, shape (n, 2), in input order; NaN and infinities as they come.

        OUT_OF_MEMORY, a NaN, stands for an item that could not be scored for want of memory.
        """
        ...

    def score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        """Raw scores, shape (n,), in input order."""
        ...

    def check(self) -> None:
        """Raises: BackendUnavailableError while nothing can be scored."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def is_out_of_memory(scores: NDArray[np.float32]) -> bool:
    """Whether OUT_OF_MEMORY is among the scores."""
    return bool((scores.view(np.uint32) == OUT_OF_MEMORY.view(np.uint32)).any())
