"""Scores with a sequence-classification model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cwpo.errors import ConfigError
from cwpo_annotator.backends import int8, layers
from cwpo_annotator.backends.in_process import InProcessBackend, best_device, default_budget
from cwpo_annotator.backends.padding import padded
from cwpo_annotator.backends.shared_prefix import read_row
from cwpo_annotator.model import load_model
from cwpo_annotator.packing import Row


class TorchBackend(InProcessBackend):
    """Packed rows with shared prompts for decoders; padded, length-sorted batches for the rest.

    Args:
        folder: a checkpoint with one output, in safetensors.
        pad_token_id: of the encoder; a padded text's score is read at its last other token.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU. The head is float32 always: a
            bfloat16 score has eight bits, and would tie most close pairs. int8 rounds the linear
            layers and computes the rest in float32, on a CPU only.
        device: cuda, mps, cpu, or auto for the best there is.
        token_budget: tokens a forward pass, padding included; None chooses by the device. It is
            halved whenever the device runs out of memory.
        threads: on a CPU, of the whole process; None takes the physical cores there are.
    Raises: CheckpointError for weights that cannot be loaded or have no single output;
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
            dtype = "bfloat16" if on.type == "cuda" else "float32"
        is_int8 = dtype == "int8"
        if is_int8 and on.type != "cpu":
            raise ConfigError(f"dtype int8 is for CPUs, not for {on}: use bfloat16")
        self.pad_token_id = pad_token_id
        dtype_of_rest = torch.float32 if is_int8 else getattr(torch, dtype)
        self.model = load_model(folder, dtype=dtype_of_rest, pad_token_id=pad_token_id).to(on)
        _keep_head_in_float32(self.model)
        if not is_int8:
            layers.replace(self.model.base_model, token_budget or default_budget(on))
        super().__init__(
            [self.model], device=on, dtype=dtype, token_budget=token_budget, threads=threads
        )
        if is_int8:
            int8.round_weights(self.model.base_model)

    def close(self) -> None:
        """Free the model."""
        super().close()
        del self.model

    def _of_row(self, row: Row, starts: Sequence[int]) -> torch.Tensor:
        hidden = read_row(self.model, row)
        # Equal texts are read at one place, and rounding may differ from place to place.
        places, of_text = np.unique(row.last, return_inverse=True)
        scores: torch.Tensor = self.model.score(hidden[places])[of_text, 0]
        return scores

    def _of_batch(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        ids, mask = padded(texts, self.pad_token_id, self.model.device)
        scores: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return scores


def _keep_head_in_float32(model: torch.nn.Module) -> None:
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    for head in heads:
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
