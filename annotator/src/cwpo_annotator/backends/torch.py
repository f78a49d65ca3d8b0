"""Scores with a sequence-classification model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from cwpo_annotator import checkpoint
from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.checkpoint import CheckpointError

# Tokens a forward pass, padding included: on a CPU a few texts at a time stay in the caches.
_TOKEN_BUDGETS = {"cpu": 1024, "mps": 8192, "cuda": 32768}


class TorchBackend:
    """Length-sorted batches under a token budget, right-padded.

    Args:
        folder: a checkpoint with one output, in safetensors.
        pad_token_id: of the encoder; the score is read at the last other token.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU. The head is float32 always: a
            bfloat16 score has eight bits, and would tie most close pairs.
        device: cuda, mps, cpu, or auto for the best there is.
        token_budget: tokens a forward pass, padding included; None chooses by the device.
    Raises: CheckpointError for weights that cannot be loaded or have no single output.
    """

    name = "torch"

    def __init__(
        self,
        folder: Path,
        *,
        pad_token_id: int,
        dtype: str = "auto",
        device: str = "auto",
        token_budget: int | None = None,
    ) -> None:
        self.device = best_device() if device == "auto" else device
        kind = torch.device(self.device).type
        self.dtype = ("bfloat16" if kind == "cuda" else "float32") if dtype == "auto" else dtype
        self.token_budget = token_budget or _TOKEN_BUDGETS.get(kind, 8192)
        self.pad_token_id = pad_token_id
        self.model = _load(folder, getattr(torch, self.dtype)).to(self.device).eval()
        self.model.config.pad_token_id = pad_token_id
        _keep_head_in_float32(self.model)

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        """Shape (n, 2); see Backend."""
        sequences = [ids for pair in pairs for ids in (pair.a, pair.b)]
        return self._score(sequences).reshape(-1, 2)

    def score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        """Shape (n,); see Backend."""
        return self._score([text.ids for text in texts])

    def close(self) -> None:
        """Free the model."""
        del self.model

    @torch.inference_mode()
    def _score(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        scores = np.empty(len(sequences), np.float32)
        for rows in self._batches([len(ids) for ids in sequences]):
            ids, mask = self._padded([sequences[row] for row in rows])
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            scores[rows] = logits[:, 0].float().cpu().numpy()
        return scores

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of like lengths, longest first, so many that they fit the budget."""
        batches: list[list[int]] = []
        width = 0
        for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            if batches and (len(batches[-1]) + 1) * width <= self.token_budget:
                batches[-1].append(index)
            else:
                batches.append([index])
                width = lengths[index]
        return batches

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(ids) for ids in sequences)
        ids = torch.full((len(sequences), width), self.pad_token_id)
        mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            mask[row, : len(sequence)] = 1
        return ids.to(self.device), mask.to(self.device)


def best_device() -> str:
    """The fastest device that torch sees."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _load(folder: Path, dtype: torch.dtype) -> Any:
    count = checkpoint.outputs(folder)
    if count != 1:
        raise CheckpointError(
            f"{folder}: the head has {count} outputs; an annotator has one score (num_labels=1)"
        )
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {reason}") from error


def _keep_head_in_float32(model: torch.nn.Module) -> None:
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    for head in heads:
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
