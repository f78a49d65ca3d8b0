"""Validation on labelled pairs kept out of training: it chooses weights and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.calibration import fit_temperature, likelihood_loss
from cwpo_trainer.annotators.forward import E, PassBudget, most_tokens
from cwpo_trainer.annotators.objectives import PairScorer
from cwpo_trainer.annotators.ranks import Ranks
from cwpo_trainer.annotators.shards import part_of, whole_of


class Validation(Generic[E]):
    """Keeps the weights with the lowest validation loss, and says when to stop.

    The loss is eq. 5 at the temperature that fits the margins best. A model that trains on grows
    too sure of itself first and forgets how to rank later; only the latter costs anything, since
    the annotator is calibrated on these pairs in the end.

    Args:
        scorer: the model that is trained.
        pairs: not trained on; with none, the last weights are kept.
        every: steps from one check to the next.
        patience: checks without a lower loss before training stops; None never stops it.
    """

    def __init__(
        self, scorer: PairScorer[E], pairs: Sequence[E], *, every: int, patience: int | None
    ) -> None:
        self.pairs = pairs
        self.temperature: float | None = None
        self.best_step: int | None = None
        self._scorer = scorer
        self._every = every
        self._patience = patience
        self._lowest = float("inf")
        self._checks_since = 0
        self._weights: dict[str, Tensor] = {}

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to check the weights after step `step` of `steps`."""
        return bool(self.pairs) and (step % self._every == 0 or step == steps)

    def check(self, step: int, ranks: Ranks, budget: PassBudget) -> dict[str, float]:
        """Judge the weights of this step by the margins of the pairs; figures for the log.

        Args:
            budget: of the scorer's forward passes.
        """
        longest = most_tokens(ranks.share(self.pairs))
        margins = ranks.gather(budget.fit(lambda: self._margins(ranks), longest=longest))
        temperature = fit_temperature(margins)
        loss = likelihood_loss(margins, temperature if temperature is not None else np.inf)
        self._checks_since += 1
        if loss < self._lowest:
            self._lowest, self._checks_since = loss, 0
            self.best_step, self.temperature = step, temperature
            weights = trainable(self._scorer.model)
            self._weights = {name: _copy(value) for name, value in weights.items()}
        return {
            "validation_loss": likelihood_loss(margins),
            "validation_loss_calibrated": loss,
            "validation_accuracy": float(np.where(margins == 0, 0.5, margins > 0).mean()),
        }

    @torch.no_grad()
    def _margins(self, ranks: Ranks) -> NDArray[np.float64]:
        """Score of a less that of b, without dropout, of this process's pairs in any order."""
        model = self._scorer.model
        model.eval()
        passes = partial(self._scorer.passes, as_served=True)
        scores = [part.cpu().numpy() for part, counts in ranks.read(self.pairs, passes) if counts]
        model.train()
        margins = [part[:, 0] - part[:, 1] for part in scores]
        return np.concatenate([np.empty(0), *margins]).astype(np.float64)

    @property
    def is_over(self) -> bool:
        """Whether training should stop: `patience` checks have brought no lower loss."""
        return self._patience is not None and self._checks_since >= self._patience

    def state(self) -> dict[str, Any]:
        """The state to resume from, for `load`; of a shared model, in the first process."""
        return {
            "temperature": self.temperature,
            "best_step": self.best_step,
            "lowest": self._lowest,
            "checks_since": self._checks_since,
            "weights": {name: whole_of(value) for name, value in self._weights.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a `state`."""
        self.temperature, self.best_step = state["temperature"], state["best_step"]
        self._lowest, self._checks_since = state["lowest"], state["checks_since"]
        weights = trainable(self._scorer.model)
        self._weights = {
            name: _copy(part_of(value, weights[name])) for name, value in state["weights"].items()
        }

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give the model the best weights back, where any were kept."""
        weights = trainable(self._scorer.model)
        for name, value in self._weights.items():
            weights[name].copy_(value)


def trainable(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _copy(value: Tensor) -> Tensor:
    """A copy in main memory, which the next step does not change."""
    return value.detach().to("cpu", copy=True)
