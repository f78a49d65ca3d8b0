"""An annotator with a scalar head while it is trained: its scores of pairs, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.backends.torch.loading import keep_head_in_float32
from cwpo_annotator.backends.torch.rows.packing import length_sorted, pack_pairs
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.backends.torch.rows.shared_prompts import (
    drops_attention,
    read_row,
    share_prompts,
)
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.annotators.forward import (
    distinct,
    mixed_precision,
    most_together,
    of_a_and_b,
    pair_width,
    score_margins,
    token_budget,
)


class ScalarHeadScorer:
    """Reads pairs with a sequence-classification model, on the device that the model is on.

    A decoder reads what texts begin with once, such as the prompt of several responses, in rows
    without padding, as it does when it serves; other models read padded batches of pairs that are
    alike in length, and in each batch a text once.

    Args:
        pad_token_id: of the encoder; a padded text's score is read at its last other token.
        bfloat16: whether the backbone computes in it; the head is float32 always.
    """

    def __init__(self, model: Any, pad_token_id: int, *, bfloat16: bool) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.bfloat16 = bfloat16
        self.token_budget = token_budget(model.device)
        self._attention = model.config._attn_implementation
        keep_head_in_float32(model)
        model.eval()
        self._handed_down: bool = model.is_gradient_checkpointing
        self.shares_prompts = not drops_attention(model) and share_prompts(
            model, handed_down=self._handed_down
        )

    def scores(self, pairs: Sequence[EncodedPair]) -> Iterator[Tensor]:
        """Scores of a and b, float32: one tensor a forward pass, shape (its pairs, 2).

        The pairs come in any order.
        """
        if self.shares_prompts:
            together = most_together(self.token_budget, self.model.device)
            for row in pack_pairs(pairs, self.token_budget, most_together=together):
                with mixed_precision(self.model, bfloat16=self.bfloat16):
                    hidden = read_row(self.model, row, handed_down=self._handed_down)
                yield of_a_and_b(row, self.model.score(hidden[row.last])[:, 0])
        else:
            for batch in length_sorted([pair_width(pair) for pair in pairs], self.token_budget):
                yield self._of_padded([pairs[at] for at in batch])

    @torch.no_grad()
    def margins(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
        """Score of a less that of b, without dropout, shape (pairs,), in any order."""
        self.model.eval()
        scores = [part.cpu().numpy() for part in self.scores(pairs)]
        self.model.train()
        return score_margins(scores)

    def restore(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._attention)

    def _of_padded(self, pairs: Sequence[EncodedPair]) -> Tensor:
        texts, places = distinct([tuple(ids) for pair in pairs for ids in pair.texts])
        ids, mask = padded(texts, self.pad_token_id, self.model.device)
        with mixed_precision(self.model, bfloat16=self.bfloat16):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        scores: Tensor = logits[places, 0].float()
        return scores.view(-1, 2)
