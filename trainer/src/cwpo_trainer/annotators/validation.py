"""What labelled pairs kept out of training are for: the best weights, and the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.calibration import fit_temperature, likelihood_loss


class Validation:
    """Keeps the weights with the lowest validation loss, and says when to stop.

    The loss is eq. 5 at the temperature that fits the margins best. A model that trains on grows
    too sure of itself first and forgets how to rank later; only the latter costs anything, since
    the annotator is calibrated on these pairs in the end.

    Args:
        pairs: not trained on; with none, the last weights are kept.
        patience: checks without a lower loss before training stops; None never stops it.
    """

    def __init__(self, pairs: Sequence[EncodedPair], patience: int | None) -> None:
        self.pairs = pairs
        self.temperature: float | None = None
        self.best_step: int | None = None
        self._patience = patience
        self._lowest = float("inf")
        self._checks_since = 0
        self._weights: dict[str, Tensor] = {}

    def check(self, step: int, margins: NDArray[np.float64], model: Any) -> dict[str, float]:
        """Judge the weights of this step by their margins, shape (pairs,); figures for the log."""
        temperature = fit_temperature(margins)
        loss = likelihood_loss(margins, temperature if temperature is not None else np.inf)
        self._checks_since += 1
        if loss < self._lowest:
            self._lowest, self._checks_since = loss, 0
            self.best_step, self.temperature = step, temperature
            self._weights = {name: copy(value) for name, value in trained(model).items()}
        return {
            "validation_loss": likelihood_loss(margins),
            "validation_loss_calibrated": loss,
            "validation_accuracy": float(np.where(margins == 0, 0.5, margins > 0).mean()),
        }

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end."""
        return self._patience is not None and self._checks_since >= self._patience

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on from here."""
        return {
            "temperature": self.temperature,
            "best_step": self.best_step,
            "lowest": self._lowest,
            "checks_since": self._checks_since,
            "weights": self._weights,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.temperature, self.best_step = state["temperature"], state["best_step"]
        self._lowest, self._checks_since = state["lowest"], state["checks_since"]
        self._weights = state["weights"]

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Give the model the best weights back, where any were kept."""
        for name, value in self._weights.items():
            trained(model)[name].copy_(value)


def copy(value: Tensor) -> Tensor:
    """The values in main memory, where they are safe from the next step."""
    return value.detach().to("cpu", copy=True)


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
