"""A language model while it is trained as an annotator by its implicit reward (DPO, eq. 17)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.backends.torch.log_probs import batch_log_probs, row_log_probs
from cwpo_annotator.backends.torch.rows.packing import length_sorted, pack_pairs, pack_texts
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.backends.torch.rows.shared_prompts import drops_attention, share_prompts
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_trainer.annotators.forward import (
    distinct,
    mixed_precision,
    most_together,
    of_a_and_b,
    pair_width,
    pairs_in,
    score_margins,
    token_budget,
)


class ResponseReader:
    """Reads responses with a causal language model, on the device that the model is on.

    Dropout is switched off: a log-ratio is to measure training, not the noise of its two sides.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.token_budget = token_budget(model.device)
        self._attention = model.config._attn_implementation
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.eval()
        self._handed_down: bool = model.is_gradient_checkpointing
        self.shares_prompts = not drops_attention(model) and share_prompts(
            model, handed_down=self._handed_down
        )

    def of_pairs(
        self, pairs: Sequence[EncodedPair], *, bfloat16: bool
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Log-probabilities of both responses of each pair, summed over their tokens.

        Yields: for each forward pass the places of its pairs in `pairs`, and a float32 tensor of
            shape (its pairs, 2).
        """
        if self.shares_prompts:
            together = most_together(self.token_budget, self.model.device)
            for row in pack_pairs(pairs, self.token_budget, most_together=together):
                starts = [pairs[text // 2].start for text in row.texts]
                with mixed_precision(self.model, bfloat16=bfloat16):
                    sums = self._of_row(row, starts)
                yield pairs_in(row), of_a_and_b(row, sums)
            return
        for batch in length_sorted([pair_width(pair) for pair in pairs], self.token_budget):
            texts = [(ids, pairs[at].start) for at in batch for ids in pairs[at].texts]
            yield batch, self._of_padded(texts, bfloat16=bfloat16).view(-1, 2)

    def of_texts(
        self, texts: Sequence[EncodedText], *, bfloat16: bool
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Log-probabilities of single responses, as `of_pairs` gives them; shape (its texts,)."""
        if self.shares_prompts:
            together = most_together(self.token_budget, self.model.device)
            ids = [text.ids for text in texts]
            for row in pack_texts(ids, self.token_budget, most_together=together):
                starts = [texts[at].start for at in row.texts]
                with mixed_precision(self.model, bfloat16=bfloat16):
                    sums = self._of_row(row, starts)
                yield row.texts, sums
            return
        for batch in length_sorted([text.tokens for text in texts], self.token_budget):
            of_batch = [(texts[at].ids, texts[at].start) for at in batch]
            yield batch, self._of_padded(of_batch, bfloat16=bfloat16)

    def _of_row(self, row: Row, starts: Sequence[int]) -> Tensor:
        return row_log_probs(self.model, row, starts, handed_down=self._handed_down).sums

    def _of_padded(self, texts: Sequence[tuple[Sequence[int], int]], *, bfloat16: bool) -> Tensor:
        """Log-probabilities of the responses in a padded batch of texts, each with its start."""
        read, places = distinct([(tuple(ids), start) for ids, start in texts])
        ids, starts = zip(*read, strict=True)
        with mixed_precision(self.model, bfloat16=bfloat16):
            sums = batch_log_probs(self.model, ids, starts).sums
        return sums[places]

    @torch.no_grad()
    def with_reference(
        self, pairs: Sequence[EncodedPair], *, bfloat16: bool
    ) -> list[ReferencedPair]:
        """The pairs, with the model as it is now for their reference."""
        reference = {
            at: log_probs
            for places, sums in self.of_pairs(pairs, bfloat16=bfloat16)
            for at, log_probs in zip(places, sums, strict=True)
        }
        return [ReferencedPair(pair, reference[at]) for at, pair in enumerate(pairs)]

    def restore(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._attention)


@dataclass(frozen=True, slots=True)
class ReferencedPair:
    """A pair, and the log-probabilities of its responses under the reference, shape (2,)."""

    pair: EncodedPair
    reference: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of both texts."""
        return self.pair.tokens


class ImplicitRewardScorer:
    """Scores a response by beta * (log pi(y | x) - log pi_ref(y | x)).

    Args:
        beta: strength of the pull towards the reference.
        bfloat16: whether training computes in it; `margins` are in float32, as in serving.
    """

    def __init__(self, reader: ResponseReader, *, beta: float, bfloat16: bool) -> None:
        self.reader = reader
        self.beta = beta
        self.bfloat16 = bfloat16

    @property
    def model(self) -> Any:
        """The language model that is trained."""
        return self.reader.model

    def scores(self, pairs: Sequence[ReferencedPair]) -> Iterator[Tensor]:
        """Scores of a and b, float32: one tensor a forward pass, shape (its pairs, 2).

        The pairs come in any order.
        """
        yield from self._rewards(pairs, bfloat16=self.bfloat16)

    @torch.no_grad()
    def margins(self, pairs: Sequence[ReferencedPair]) -> NDArray[np.float64]:
        """Score of a less that of b, shape (pairs,), in any order."""
        return score_margins([part.cpu().numpy() for part in self._rewards(pairs, bfloat16=False)])

    def _rewards(self, pairs: Sequence[ReferencedPair], *, bfloat16: bool) -> Iterator[Tensor]:
        encoded = [item.pair for item in pairs]
        for places, sums in self.reader.of_pairs(encoded, bfloat16=bfloat16):
            reference = torch.stack([pairs[at].reference for at in places])
            yield self.beta * (sums - reference)
