"""Scores by an encoder-decoder that answers which of two responses is better, as SteamSHP does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.backends.torch.in_process import InProcessBackend
from cwpo_annotator.backends.torch.loading import load_encoder_decoder
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.backends.torch.rows.row import Row


class EncoderDecoderBackend(InProcessBackend):
    """score = log(P / (1 - P)), with P the probability that the answer begins with a given token.

    P itself orders responses alike, but nears 1, where float32 would tie them.

    Args:
        folder: a checkpoint of an encoder-decoder.
        answer_token_id: the token.
        pad_token_id: fills batches up.
        dtype: auto is float32 on every device: logits in bfloat16 would tie close responses.
        device: cuda, mps, cpu, or auto for the fastest available device.
        token_budget: maximum number of tokens in a forward pass, padding included; None chooses
            by the device.
        threads: CPU threads of the whole process; None uses one per physical core.
    Raises: CheckpointError for weights that cannot be loaded, or not of an encoder-decoder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        answer_token_id: int,
        pad_token_id: int,
        dtype: str = "auto",
        device: str = "auto",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        on = torch.device(best_device() if device == "auto" else device)
        dtype = "float32" if dtype == "auto" else dtype
        self.answer_token_id = answer_token_id
        self.pad_token_id = pad_token_id
        self.model: Any = load_encoder_decoder(folder, getattr(torch, dtype)).to(on)
        super().__init__(
            [self.model.encoder],
            [],
            device=on,
            dtype=dtype,
            token_budget=token_budget,
            threads=threads,
        )

    def close(self) -> None:
        """Free the model."""
        super().close()
        del self.model

    def _score_row(self, row: Row, starts: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError("its encoder reads padded batches only")

    def _score_batch(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        ids, mask = padded(texts, self.pad_token_id, self.model.device)
        start = torch.full_like(ids[:, :1], self.model.config.decoder_start_token_id)
        output = self.model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False
        )
        logits: torch.Tensor = output.logits[:, 0].float()
        answer = logits[:, self.answer_token_id].clone()
        logits[:, self.answer_token_id] = -torch.inf
        return answer - logits.logsumexp(dim=1)
