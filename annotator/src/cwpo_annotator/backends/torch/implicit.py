"""Scores by the implicit reward of a language model that was trained by DPO, eq. 17."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.backends.torch.in_process import InProcessBackend
from cwpo_annotator.backends.torch.loading import load_language_model
from cwpo_annotator.backends.torch.log_probs import batch_log_probs, row_log_probs
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.checkpoint import REFERENCE_NAME


class ImplicitBackend(InProcessBackend):
    """score = beta * (log pi(y | x) - log pi_ref(y | x)), summed over the tokens of y.

    Args:
        folder: a checkpoint of a causal language model, with its reference in the subfolder
            `reference`.
        beta: factor of the reward; the --beta that the annotator was trained with.
        dtype: auto is float32 on every device: after a short training, the two models differ by
            less than the resolution of bfloat16.
        device: cuda, mps, cpu, or auto for the fastest available device.
        token_budget: maximum number of tokens in a forward pass, padding included; None chooses
            by the device. Halved whenever the device runs out of memory.
        threads: CPU threads of the whole process; None uses one per physical core.
    Raises: CheckpointError for weights that cannot be loaded, or not of a causal language model.
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
        super().__init__(
            models, models, device=on, dtype=dtype, token_budget=token_budget, threads=threads
        )

    def close(self) -> None:
        """Free both models."""
        super().close()
        del self.policy, self.reference

    def _score_row(self, row: Row, starts: Sequence[int]) -> torch.Tensor:
        policy, reference = (
            row_log_probs(model, row, starts).sums for model in (self.policy, self.reference)
        )
        return self.beta * (policy - reference)

    def _score_batch(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        policy, reference = (
            batch_log_probs(model, texts, starts).sums for model in (self.policy, self.reference)
        )
        return self.beta * (policy - reference)
