"""The interface of scoring backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from cwpo.errors import CwpoError
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.scores import Scores

# What the texts of a call share and a model reads once: what they begin with, only texts that are
# equal, or nothing.
ReadsOnce = Literal["beginnings", "texts", "nothing"]


class BackendUnavailableError(CwpoError):
    """The backend cannot score at the moment; the same request may succeed later."""


class NoEmbeddingsError(CwpoError):
    """An annotator whose backend shows no hidden states was asked for embeddings."""

    def __init__(self, backend: str) -> None:
        super().__init__(
            f"the backend {backend} has no embeddings of triplets: host the annotator with "
            "--backend torch"
        )


class Backend(Protocol):
    """Scores token ids with one loaded model. Called from one thread at a time."""

    name: str
    device: str
    dtype: str

    # Tokens per call that keep the backend busy: with more, other requests would only wait longer.
    batch_tokens: int
    # By which those tokens are counted.
    reads_once: ReadsOnce

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """Raw scores of responses a and b of each pair, in input order: values of shape (n, 2)."""
        ...

    def score_texts(self, texts: Sequence[EncodedText]) -> Scores:
        """Raw scores of single texts, in input order: values of shape (n,)."""
        ...

    def check(self) -> None:
        """Raises: BackendUnavailableError while nothing can be scored."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@runtime_checkable
class EmbeddingBackend(Protocol):
    """A backend that shows what its model makes of a text, beside the score."""

    def embed_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """The embedding of each pair, in input order: values of shape (n, width)."""
        ...
