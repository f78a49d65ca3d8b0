"""Scores from a hash, without model, tokens or torch, for load tests of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from cwpo.types import Prompt, ScoreItem, Triplet, Truncation
from cwpo_annotator.backends.base import ReadsOnce
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.scores import Scores

_SPAN = 8.0


class NullEncoder:
    """Replaces the tokenizer: the only token of a text is its 32-bit hash."""

    max_length = 1 << 20
    compares_only = False
    reads = "a hash of prompt and response"

    def encode_pairs(
        self, triplets: Sequence[Triplet], truncation: Truncation
    ) -> list[EncodedPair]:
        """One token per text; no text is too long."""
        hashes = [_hash(triplet.prompt) for triplet in triplets]
        return [
            EncodedPair(
                (crc32(triplet.response_a.encode(), prompt),),
                (crc32(triplet.response_b.encode(), prompt),),
            )
            for triplet, prompt in zip(triplets, hashes, strict=True)
        ]

    def encode_texts(self, items: Sequence[ScoreItem], truncation: Truncation) -> list[EncodedText]:
        """One token per text."""
        singles = [(item.prompt, (item.response,)) for item in items]
        return [text for (text,) in self.encode_responses(singles, truncation)]

    def encode_responses(
        self, items: Sequence[tuple[Prompt, Sequence[str]]], truncation: Truncation
    ) -> list[list[EncodedText]]:
        """One token per text."""
        hashes = [_hash(prompt) for prompt, _ in items]
        return [
            [EncodedText((crc32(response.encode(), prompt),)) for response in responses]
            for (_, responses), prompt in zip(items, hashes, strict=True)
        ]


class NullBackend:
    """Maps the hash to a score, uniform in [-4, 4)."""

    name = "null"
    device = "cpu"
    dtype = "float32"
    batch_tokens = 4096
    reads_once: ReadsOnce = "nothing"

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """Values of shape (n, 2)."""
        hashes = ([pair.a[0] for pair in pairs], [pair.b[0] for pair in pairs])
        return _score(np.array(hashes, dtype=np.float64).T)

    def score_texts(self, texts: Sequence[EncodedText]) -> Scores:
        """Values of shape (n,)."""
        return _score(np.array([text.ids[0] for text in texts], dtype=np.float64))

    def check(self) -> None:
        """The null backend is always available."""

    def close(self) -> None:
        """There is nothing to free."""


def _hash(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return crc32(prompt.encode())
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in prompt)
    return crc32(text.encode())


def _score(hashes: NDArray[np.float64]) -> Scores:
    return Scores(((hashes / 2.0**32 - 0.5) * _SPAN).astype(np.float32))
