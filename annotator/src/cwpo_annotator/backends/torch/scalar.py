"""Scores with a sequence-classification model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cwpo.errors import ConfigError
from cwpo_annotator.backends.torch.hardware.device import (
    best_device,
    integers,
    multiplies_bfloat16,
)
from cwpo_annotator.backends.torch.in_process import InProcessBackend
from cwpo_annotator.backends.torch.kernels.int8 import round_weights
from cwpo_annotator.backends.torch.loading import keep_head_in_float32, load_classifier
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.backends.torch.rows.shared_prompts import read_row


class ScalarHeadBackend(InProcessBackend):
    """Reads packed rows with shared prompts (decoders), or padded, length-sorted batches (others).

    Args:
        folder: a checkpoint with one output, in safetensors.
        pad_token_id: pad token of the encoder; the score of a padded text is read at its last
            token that is not padding.
        dtype: auto is bfloat16 on a GPU that has it, and else float32. The head is always float32.
            int8 rounds the linear layers and computes the rest in float32, on a CPU only.
        device: cuda, mps, cpu, or auto for the fastest available device.
        token_budget: maximum number of tokens in a forward pass, padding included; None chooses
            by the device. Halved whenever the device runs out of memory.
        threads: CPU threads of the whole process; None uses one per physical core.
    Raises: CheckpointError for weights that cannot be loaded or do not have one output;
        ConfigError for int8 on another device.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pad_token_id: int,
        dtype: str = "auto",
        device: str = "auto",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        on = torch.device(best_device() if device == "auto" else device)
        if dtype == "auto":
            dtype = "bfloat16" if on.type == "cuda" and multiplies_bfloat16() else "float32"
        is_int8 = dtype == "int8"
        if is_int8 and on.type != "cpu":
            raise ConfigError(f"dtype int8 is for CPUs, not for {on}: use bfloat16")
        self.pad_token_id = pad_token_id
        dtype_of_rest = torch.float32 if is_int8 else getattr(torch, dtype)
        self.model = load_classifier(folder, dtype=dtype_of_rest, pad_token_id=pad_token_id).to(on)
        keep_head_in_float32(self.model)
        super().__init__(
            [self.model],
            [] if is_int8 else [self.model.base_model],
            device=on,
            dtype=dtype,
            token_budget=token_budget,
            threads=threads,
        )
        if is_int8:
            round_weights(self.model.base_model)

    def close(self) -> None:
        """Free the model."""
        super().close()
        del self.model

    def _score_row(self, row: Row, starts: Sequence[int]) -> torch.Tensor:
        hidden = read_row(self.model, row)
        # Equal texts are read at one place, and rounding may differ from place to place.
        places, of_text = np.unique(row.last, return_inverse=True)
        device = hidden.device
        of_places: torch.Tensor = self.model.score(hidden[integers(places, device)])[:, 0]
        return of_places[integers(of_text, device)]

    def _score_batch(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        ids, mask = padded(texts, self.pad_token_id, self.model.device)
        scores: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return scores
