"""The input of a model: the token ids of a prompt with one response, or with two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


# Not frozen: to make one would take four times as long, and a service makes one a triplet.
@dataclass(slots=True)
class EncodedText:
    """The token ids of one prompt with one response.

    start: position of the first token of the response; 0 if the encoder does not mark it.
    """

    ids: Sequence[int]
    truncated: bool = False
    start: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def texts(self) -> tuple[Sequence[int]]:
        """The token ids, as the only text."""
        return (self.ids,)


@dataclass(slots=True)
class EncodedResponses:
    """The token ids of one prompt with each of its responses, equal responses once.

    places: for each response, the position of its text in `texts`.
    """

    texts: Sequence[EncodedText]
    places: Sequence[int]

    @property
    def truncated(self) -> bool:
        """Whether the prompt was cut, for all responses alike."""
        return self.texts[0].truncated


@dataclass(slots=True)
class EncodedPair:
    """The token ids of one prompt with each of its two responses.

    start: position of the first token of the responses, before which a and b are equal; 0 if the
    encoder does not mark it.
    """

    a: Sequence[int]
    b: Sequence[int]
    truncated: bool = False
    start: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens of both texts together."""
        return len(self.a) + len(self.b)

    @property
    def texts(self) -> tuple[Sequence[int], Sequence[int]]:
        """The token ids of both texts."""
        return self.a, self.b
