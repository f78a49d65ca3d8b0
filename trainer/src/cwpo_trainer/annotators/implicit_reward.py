"""A language model while it is trained as an annotator by its implicit reward (DPO, eq. 17)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    Pass,
    PassBudget,
    Root,
    distinct,
    mixed_precision,
    most_tokens,
    of_a_and_b,
    pair_width,
    pairs_in,
)
from cwpo_trainer.annotators.ranks import Ranks


class ResponseReader:
    """Reads responses with a causal language model, on the device that the model is on.

    Dropout is switched off: a log-ratio is to measure training, not the noise of its two sides.

    Args:
        budget: of each forward pass.
    """

    def __init__(self, model: Any, budget: PassBudget) -> None:
        self.model = model
        self.root = Root(model)
        self.budget = budget
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
    ) -> list[tuple[list[int], Pass]]:
        """Log-probabilities of both responses of each pair, summed over their tokens.

        Returns: the places in `pairs` of the pairs of each forward pass, and the pass, which gives
            a float32 tensor of shape (its pairs, 2).
        """
        if self.shares_prompts:
            rows = pack_pairs(pairs, self.budget.tokens, most_together=self.budget.together)
            return [
                (pairs_in(row), self._pass(self._pairs_of_row, row, pairs, bfloat16))
                for row in rows
            ]
        batches = length_sorted([pair_width(pair) for pair in pairs], self.budget.tokens)
        return [
            (batch, self._pass(self._pairs_of_batch, [pairs[at] for at in batch], bfloat16))
            for batch in batches
        ]

    def of_texts(
        self, texts: Sequence[EncodedText], *, bfloat16: bool
    ) -> list[tuple[list[int], Pass]]:
        """Log-probabilities of single responses, as `of_pairs` gives them; shape (its texts,)."""
        if self.shares_prompts:
            ids = [text.ids for text in texts]
            rows = pack_texts(ids, self.budget.tokens, most_together=self.budget.together)
            return [(row.texts, self._pass(self._of_row, row, texts, bfloat16)) for row in rows]
        batches = length_sorted([text.tokens for text in texts], self.budget.tokens)
        return [
            (batch, self._pass(self._of_batch, [texts[at] for at in batch], bfloat16))
            for batch in batches
        ]

    def _pass(self, read: Callable[..., Tensor], *args: Any) -> Pass:
        return partial(self.root, partial(read, *args))

    def _pairs_of_row(self, row: Row, pairs: Sequence[EncodedPair], bfloat16: bool) -> Tensor:
        starts = [pairs[text // 2].start for text in row.texts]
        return of_a_and_b(row, self._of_packed(row, starts, bfloat16))

    def _pairs_of_batch(self, pairs: Sequence[EncodedPair], bfloat16: bool) -> Tensor:
        texts = [(ids, pair.start) for pair in pairs for ids in pair.texts]
        return self._of_padded(texts, bfloat16).view(-1, 2)

    def _of_row(self, row: Row, texts: Sequence[EncodedText], bfloat16: bool) -> Tensor:
        return self._of_packed(row, [texts[at].start for at in row.texts], bfloat16)

    def _of_batch(self, texts: Sequence[EncodedText], bfloat16: bool) -> Tensor:
        return self._of_padded([(text.ids, text.start) for text in texts], bfloat16)

    def _of_packed(self, row: Row, starts: Sequence[int], bfloat16: bool) -> Tensor:
        with mixed_precision(self.model, bfloat16=bfloat16):
            return row_log_probs(self.model, row, starts, handed_down=self._handed_down).sums

    def _of_padded(self, texts: Sequence[tuple[Sequence[int], int]], bfloat16: bool) -> Tensor:
        """Log-probabilities of the responses in a padded batch of texts, each with its start."""
        read, places = distinct([(tuple(ids), start) for ids, start in texts])
        ids, starts = zip(*read, strict=True)
        with mixed_precision(self.model, bfloat16=bfloat16):
            sums = batch_log_probs(self.model, ids, starts).sums
        return sums[places]

    @torch.no_grad()
    def with_reference(
        self, pairs: Sequence[EncodedPair], ranks: Ranks, *, bfloat16: bool
    ) -> list[ReferencedPair]:
        """The pairs, with the model as it is now for their reference; each process reads some."""
        if not pairs:
            return []
        own = self.budget.fit(
            lambda: self._log_probs(pairs, ranks, bfloat16=bfloat16),
            longest=most_tokens(ranks.share(pairs)),
        )
        of_all = torch.from_numpy(ranks.gather(own)).float().to(ranks.device)
        return [ReferencedPair(pair, of_all[at]) for at, pair in enumerate(pairs)]

    def _log_probs(
        self, pairs: Sequence[EncodedPair], ranks: Ranks, *, bfloat16: bool
    ) -> NDArray[np.float64]:
        """Those of this process's share of the pairs, in order, shape (its pairs, 2)."""
        order: list[int] = []

        def passes(some: Sequence[EncodedPair]) -> list[Pass]:
            of_pairs = self.of_pairs(some, bfloat16=bfloat16)
            order.extend(at for places, _ in of_pairs for at in places)
            return [read for _, read in of_pairs]

        sums = [part.cpu().numpy() for part, counts in ranks.read(pairs, passes) if counts]
        found = np.concatenate([np.empty((0, 2)), *sums])
        # What comes after these are pairs that do not count.
        return found[np.argsort(order[: len(found)])]

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
        bfloat16: whether training computes in it.
    """

    def __init__(self, reader: ResponseReader, *, beta: float, bfloat16: bool) -> None:
        self.reader = reader
        self.beta = beta
        self.bfloat16 = bfloat16

    @property
    def model(self) -> Any:
        """The language model that is trained."""
        return self.reader.model

    def passes(self, pairs: Sequence[ReferencedPair], *, as_served: bool = False) -> list[Pass]:
        """Forward passes that give scores of a and b, float32, shape (pairs of the pass, 2).

        The pairs come in any order.

        Args:
            as_served: in float32.
        """
        bfloat16 = self.bfloat16 and not as_served
        of_pairs = self.reader.of_pairs([item.pair for item in pairs], bfloat16=bfloat16)
        return [
            partial(self._rewards, read, [pairs[at].reference for at in places])
            for places, read in of_pairs
        ]

    def _rewards(self, read: Pass, reference: Sequence[Tensor]) -> Tensor:
        return self.beta * (read() - torch.stack([*reference]))
