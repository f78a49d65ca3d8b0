"""Scores by the implicit reward of a language model that was trained by DPO, eq. 17."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cwpo_annotator.backends import layers
from cwpo_annotator.backends.in_process import InProcessBackend, best_device
from cwpo_annotator.backends.language_model import load_language_model, of_batch, of_row
from cwpo_annotator.checkpoint import REFERENCE_NAME
from cwpo_annotator.packing import Row


class ImplicitBackend(InProcessBackend):
    """score = beta * (log pi(y | x) - log pi_ref(y | x)), summed over the tokens of y.

    Args:
        folder: a checkpoint of a causal language model, its reference in the folder of that name.
        beta: of the training.
        dtype: auto is float32 on every device: the two models differ by less than bfloat16
            resolves, unless training was long.
        device: cuda, mps, cpu, or auto for the best there is.
        token_budget: tokens a forward pass, padding included; None chooses by the device. It is
            halved whenever the device runs out of memory.
        threads: on a CPU, of the whole process; None takes the physical cores there are.
    Raises: CheckpointError for weights that cannot be loaded or are no causal language model's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        beta: float,
        dtype: str = "auto",
        device: str = "auto",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        on = torch.device(best_device() if device == "auto" else device)
        dtype = "float32" if dtype == "auto" else dtype
        self.beta = beta
        self.policy, self.reference = (
            load_language_model(path, getattr(torch, dtype)).to(on)
            for path in (folder, folder / REFERENCE_NAME)
        )
        models = [self.policy, self.reference]
        super().__init__(models, device=on, dtype=dtype, token_budget=token_budget, threads=threads)
        for model in models:
            layers.replace(model, self.token_budget)

    def close(self) -> None:
        """Free both models."""
        super().close()
        del self.policy, self.reference

    def _of_row(self, row: Row, starts: Sequence[int]) -> torch.Tensor:
        policy, reference = (of_row(model, row, starts) for model in (self.policy, self.reference))
        return self.beta * (policy - reference)

    def _of_batch(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        policy, reference = (
            of_batch(model, texts, starts) for model in (self.policy, self.reference)
        )
        return self.beta * (policy - reference)
