"""Training objectives: the loss of each example, and other figures of it for the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from cwpo_annotator.encoded import EncodedText
from cwpo_trainer.annotators.forward import E, Example, Pass
from cwpo_trainer.annotators.implicit_reward import ResponseReader

E_contra = TypeVar("E_contra", bound=Example, contravariant=True)


class PairScorer(Protocol[E_contra]):
    """A model in training that scores both responses of a pair."""

    @property
    def model(self) -> Any:
        """The module whose parameters are trained."""
        ...

    def passes(self, pairs: Sequence[E_contra], *, as_served: bool = False) -> list[Pass]:
        """Forward passes that give scores of a and b, float32, shape (pairs of the pass, 2).

        Args:
            as_served: in the number format that the annotator is served in, to measure it.
        """
        ...


class Objective(Protocol[E_contra]):
    """What a training minimises over examples of one kind.

    figures: names of what is told of each example; the first is the loss.
    """

    figures: tuple[str, ...]

    @property
    def model(self) -> Any:
        """The module whose parameters are trained."""
        ...

    def passes(self, examples: Sequence[E_contra]) -> list[Pass]:
        """Forward passes that give figures, shape (figures, examples of the pass)."""
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

    def passes(self, examples: Sequence[E]) -> list[Pass]:
        """Passes that give the loss of each pair, and 1 where a scores above b."""
        return [partial(self._figures, read) for read in self._scorer.passes(examples)]

    def _figures(self, read: Pass) -> Tensor:
        scores = read()
        return torch.stack([self._loss(scores), (scores[:, 0] > scores[:, 1]).float()])


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

    def passes(self, examples: Sequence[EncodedText]) -> list[Pass]:
        """Passes that give the loss of each response."""
        return [
            partial(self._losses, read, [examples[at].tokens - examples[at].start for at in places])
            for places, read in self._reader.of_texts(examples, bfloat16=self._bfloat16)
        ]

    def _losses(self, read: Pass, tokens: Sequence[int]) -> Tensor:
        sums = read()
        return -(sums / torch.tensor(tokens, device=sums.device))[None]
