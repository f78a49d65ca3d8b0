"""Scores by the implicit reward of a language model that was trained by DPO, eq. 17."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.backends.language_model import load_language_model, of_batch, of_row
from cwpo_annotator.backends.torch import best_device, share_prompts
from cwpo_annotator.checkpoint import REFERENCE_NAME
from cwpo_annotator.packing import Row, length_sorted, pack_pairs, pack_texts
from cwpo_annotator.threads import use_threads

_TOKEN_BUDGETS = {"cpu": 1024, "cuda": 32768}


class ImplicitBackend:
    """score = beta * (log pi(y | x) - log pi_ref(y | x)), summed over the tokens of y.

    Args:
        folder: a checkpoint of a causal language model, its reference in the folder of that name.
        beta: of the training.
        dtype: auto is float32 on every device: the two models differ by less than bfloat16
            resolves, unless training was long.
        device: cuda, mps, cpu, or auto for the best there is.
        token_budget: tokens a forward pass, padding included; None chooses by the device.
        threads: on a CPU, of the whole process; None takes the physical cores there are.
    Raises: CheckpointError for weights that cannot be loaded or are no causal language model's.
    """

    name = "torch"

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
        self.device = best_device() if device == "auto" else device
        if torch.device(self.device).type == "cpu":
            use_threads(threads)
        self.dtype = "float32" if dtype == "auto" else dtype
        budget = _TOKEN_BUDGETS.get(torch.device(self.device).type, 8192)
        self.token_budget = token_budget or budget
        self.beta = beta
        self.policy, self.reference = (
            load_language_model(path, getattr(torch, self.dtype)).to(self.device)
            for path in (folder, folder / REFERENCE_NAME)
        )
        self.shares_prompts = share_prompts(self.policy) and share_prompts(self.reference)

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        """Shape (n, 2); see Backend. The pairs say where their responses start."""
        starts = [start for pair in pairs for start in (pair.start, pair.start)]
        if self.shares_prompts:
            rows = pack_pairs(pairs, self.token_budget)
            scores = self._score_packed(rows, starts)
        else:
            scores = self._score_padded([ids for p in pairs for ids in (p.a, p.b)], starts)
        return scores.reshape(-1, 2)

    def score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        """Shape (n,); see Backend. The texts say where their responses start."""
        sequences, starts = [text.ids for text in texts], [text.start for text in texts]
        if self.shares_prompts:
            return self._score_packed(pack_texts(sequences, self.token_budget), starts)
        return self._score_padded(sequences, starts)

    def check(self) -> None:
        """A model in this process is there as long as the process is."""

    def close(self) -> None:
        """Free both models."""
        del self.policy, self.reference

    @torch.inference_mode()
    def _score_packed(self, rows: Iterable[Row], starts: Sequence[int]) -> NDArray[np.float32]:
        scores = np.empty(len(starts), np.float32)
        for row in rows:
            of_texts = [starts[text] for text in row.texts]
            scores[row.texts] = self._rewards(
                of_row(self.policy, row, of_texts), of_row(self.reference, row, of_texts)
            )
        return scores

    @torch.inference_mode()
    def _score_padded(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> NDArray[np.float32]:
        # Each text once and in an order of its own: equal texts tie, and a pair whose responses
        # are swapped is read in the very same batches.
        asked = [
            (len(ids), tuple(ids), start) for ids, start in zip(sequences, starts, strict=True)
        ]
        texts = sorted(set(asked))
        place = {text: at for at, text in enumerate(texts)}
        scores = np.empty(len(texts), np.float32)
        for rows in length_sorted([length for length, _, _ in texts], self.token_budget):
            batch = [texts[row][1] for row in rows], [texts[row][2] for row in rows]
            scores[rows] = self._rewards(
                of_batch(self.policy, *batch), of_batch(self.reference, *batch)
            )
        return scores[[place[text] for text in asked]]

    def _rewards(self, policy: Tensor, reference: Tensor) -> NDArray[np.float32]:
        rewards: NDArray[np.float32] = (self.beta * (policy - reference)).cpu().numpy()
        return rewards
