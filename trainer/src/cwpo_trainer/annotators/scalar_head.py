"""An annotator with a scalar head while it is trained: its scores of pairs, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from cwpo_annotator.backends.torch.loading import keep_head_in_float32
from cwpo_annotator.backends.torch.rows.packing import length_sorted, pack_pairs
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.backends.torch.rows.shared_prompts import (
    drops_attention,
    read_row,
    share_prompts,
)
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.annotators.forward import (
    Pass,
    PassBudget,
    Root,
    distinct,
    mixed_precision,
    of_a_and_b,
    pair_width,
)


class ScalarHeadScorer:
    """Reads pairs with a sequence-classification model, on the device that the model is on.

    A decoder reads what texts begin with once, such as the prompt of several responses, in rows
    without padding, as it does when it serves; other models read padded batches of pairs that are
    alike in length, and in each batch a text once.

    Args:
        pad_token_id: of the encoder; a padded text's score is read at its last other token.
        budget: of each forward pass.
        bfloat16: whether the backbone computes in it; the head is float32 always.
    """

    def __init__(
        self, model: Any, pad_token_id: int, budget: PassBudget, *, bfloat16: bool
    ) -> None:
        self.model = model
        self.root = Root(model)
        self.pad_token_id = pad_token_id
        self.bfloat16 = bfloat16
        self.budget = budget
        self._attention = model.config._attn_implementation
        keep_head_in_float32(model)
        model.eval()
        self._handed_down: bool = model.is_gradient_checkpointing
        self.shares_prompts = not drops_attention(model) and share_prompts(
            model, handed_down=self._handed_down
        )

    def passes(self, pairs: Sequence[EncodedPair], *, as_served: bool = False) -> list[Pass]:
        """Forward passes that give scores of a and b, float32, shape (pairs of the pass, 2).

        The pairs come in any order.

        Args:
            as_served: the same; a scalar head is served as it is trained.
        """
        if self.shares_prompts:
            rows = pack_pairs(pairs, self.budget.tokens, most_together=self.budget.together)
            return [partial(self.root, partial(self._of_row, row)) for row in rows]
        batches = length_sorted([pair_width(pair) for pair in pairs], self.budget.tokens)
        return [
            partial(self.root, partial(self._of_padded, [pairs[at] for at in batch]))
            for batch in batches
        ]

    def restore(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._attention)

    def _of_row(self, row: Row) -> Tensor:
        with mixed_precision(self.model, bfloat16=self.bfloat16):
            hidden = read_row(self.model, row, handed_down=self._handed_down)
        return of_a_and_b(row, self.model.score(hidden[row.last])[:, 0])

    def _of_padded(self, pairs: Sequence[EncodedPair]) -> Tensor:
        texts, places = distinct([tuple(ids) for pair in pairs for ids in pair.texts])
        ids, mask = padded(texts, self.pad_token_id, self.model.device)
        with mixed_precision(self.model, bfloat16=self.bfloat16):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        scores: Tensor = logits[places, 0].float()
        return scores.view(-1, 2)
