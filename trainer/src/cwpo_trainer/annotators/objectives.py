"""Training objectives: the loss of each example, and other figures of it for the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.encoded import EncodedText
from cwpo_trainer.annotators.implicit_reward import ResponseReader


class Example(Protocol):
    """What a model is trained on, one of many: a pair of responses, or a single response."""

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        ...


E = TypeVar("E", bound=Example)
E_contra = TypeVar("E_contra", bound=Example, contravariant=True)


class PairScorer(Protocol[E_contra]):
    """A model in training that scores both responses of a pair."""

    @property
    def model(self) -> Any:
        """The module whose parameters are trained."""
        ...

    def scores(self, pairs: Sequence[E_contra]) -> Iterator[Tensor]:
        """Scores of a and b, float32: one tensor a forward pass, shape (its pairs, 2)."""
        ...

    def margins(self, pairs: Sequence[E_contra]) -> NDArray[np.float64]:
        """Score of a less that of b, without gradients, shape (pairs,), in any order."""
        ...


class Objective(Protocol[E_contra]):
    """What a training minimises over examples of one kind.

    figures: names of what `values` tells of each example; the first is the loss.
    """

    figures: tuple[str, ...]

    @property
    def model(self) -> Any:
        """The module whose parameters are trained."""
        ...

    def values(self, examples: Sequence[E_contra]) -> Iterator[Tensor]:
        """The figures of the examples of each forward pass, shape (figures, its examples)."""
        ...


class PreferenceObjective(Generic[E]):
    """A loss of the scores of two responses, of which a is the preferred one.

    Args:
        loss: from scores of a and b, shape (n, 2), to losses, shape (n,).
    """

    figures: tuple[str, ...] = ("loss", "accuracy")

    def __init__(self, scorer: PairScorer[E], loss: Callable[[Tensor], Tensor]) -> None:
        self._scorer = scorer
        self._loss = loss

    @property
    def model(self) -> Any:
        """The module whose parameters are trained."""
        return self._scorer.model

    def values(self, examples: Sequence[E]) -> Iterator[Tensor]:
        """The loss of each pair, and 1 where a scores above b."""
        for scores in self._scorer.scores(examples):
            yield torch.stack([self._loss(scores), (scores[:, 0] > scores[:, 1]).float()])


class SupervisedFineTuning:
    """The negative mean log-probability of the response's tokens.

    Args:
        bfloat16: whether training computes in it.
    """

    figures: tuple[str, ...] = ("loss",)

    def __init__(self, reader: ResponseReader, *, bfloat16: bool) -> None:
        self._reader = reader
        self._bfloat16 = bfloat16

    @property
    def model(self) -> Any:
        """The language model that is trained."""
        return self._reader.model

    def values(self, examples: Sequence[EncodedText]) -> Iterator[Tensor]:
        """The loss of each response."""
        for places, sums in self._reader.of_texts(examples, bfloat16=self._bfloat16):
            tokens = [examples[at].tokens - examples[at].start for at in places]
            yield -(sums / torch.tensor(tokens, device=sums.device))[None]
