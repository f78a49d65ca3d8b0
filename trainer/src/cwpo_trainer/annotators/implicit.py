"""Training a language model as an annotator by its implicit reward: DPO, eq. 17."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.language_model import of_batch, of_row
from cwpo_annotator.backends.shared_prefix import share_prompts
from cwpo_annotator.packing import pack_pairs
from cwpo_trainer.annotators.scorer import TOKEN_BUDGETS, a_and_b, arithmetic, like_lengths

Part = list[EncodedPair]


class LanguageModelScorer:
    """Reads pairs with a causal language model, on the device that the model is on.

    Dropout is switched off: a log-ratio is to measure training, not the noise of its two sides.

    Args:
        bfloat16: whether training computes in it.
    """

    def __init__(self, model: Any, *, bfloat16: bool) -> None:
        self.model = model
        self.bfloat16 = bfloat16
        self.token_budget = TOKEN_BUDGETS.get(model.device.type, 8192)
        self._attention = model.config._attn_implementation
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.eval()
        # The packed attention has no dropout of its own.
        self.shares_prompts = not getattr(model.config, "attention_dropout", 0) and share_prompts(
            model
        )

    def log_probs(
        self, pairs: Sequence[EncodedPair], *, bfloat16: bool
    ) -> Iterator[tuple[Part, Tensor]]:
        """Pairs of one forward pass, and the log-probabilities of their responses, (part, 2)."""
        if self.shares_prompts:
            for row in pack_pairs(pairs, self.token_budget):
                starts = [pairs[text // 2].start for text in row.texts]
                with arithmetic(self.model, bfloat16=bfloat16):
                    sums = of_row(self.model, row, starts)
                yield [pairs[text // 2] for text in row.texts[::2]], a_and_b(row, sums)
            return
        for part in like_lengths(pairs, self.token_budget):
            texts = [*(pair.a for pair in part), *(pair.b for pair in part)]
            with arithmetic(self.model, bfloat16=bfloat16):
                sums = of_batch(self.model, texts, 2 * [pair.start for pair in part])
            yield part, sums.view(2, -1).T

    def restore(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._attention)


class ResponseScorer(LanguageModelScorer):
    """Scores a response by its mean log-probability a token: what SFT raises."""

    def scores(self, pairs: Sequence[EncodedPair]) -> Iterator[Tensor]:
        """Scores of a and b, float32, shape (part, 2): a tensor a forward pass, in any order."""
        for part, sums in self.log_probs(pairs, bfloat16=self.bfloat16):
            tokens = [[len(text) - pair.start for text in (pair.a, pair.b)] for pair in part]
            yield sums / torch.tensor(tokens, device=sums.device)

    def measure(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
        """SFT ranks no pairs: nothing."""
        return np.empty(0)


class ImplicitScorer(LanguageModelScorer):
    """Scores a response by beta * (log pi(y | x) - log pi_ref(y | x)).

    Args:
        beta: how dear it is to leave the reference.
        bfloat16: whether training computes in it; `measure` computes in float32, as serving does.
    """

    def __init__(self, model: Any, *, beta: float, bfloat16: bool) -> None:
        super().__init__(model, bfloat16=bfloat16)
        self.beta = beta
        self._reference: dict[int, Tensor] = {}

    @torch.no_grad()
    def refer(self, training: Sequence[EncodedPair], measuring: Sequence[EncodedPair]) -> None:
        """Take the model as it is now for the reference of these pairs.

        The pairs are known by identity from now on: these objects are what may be scored.
        """
        for pairs, bfloat16 in ((training, self.bfloat16), (measuring, False)):
            for part, sums in self.log_probs(pairs, bfloat16=bfloat16):
                self._reference |= {id(p): row for p, row in zip(part, sums, strict=True)}

    def scores(self, pairs: Sequence[EncodedPair]) -> Iterator[Tensor]:
        """Scores of a and b, float32 of shape (part, 2): one tensor a forward pass, in any order.

        Raises: KeyError for a pair that `refer` was not given for training.
        """
        yield from self._rewards(pairs, bfloat16=self.bfloat16)

    @torch.no_grad()
    def measure(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
        """The margins, shape (pairs,), in any order, of pairs that `refer` was given to measure."""
        parts = [part.cpu().numpy() for part in self._rewards(pairs, bfloat16=False)]
        margins = [part[:, 0] - part[:, 1] for part in parts]
        return np.concatenate([np.empty(0), *margins]).astype(np.float64)

    def _rewards(self, pairs: Sequence[EncodedPair], *, bfloat16: bool) -> Iterator[Tensor]:
        for part, sums in self.log_probs(pairs, bfloat16=bfloat16):
            reference = torch.stack([self._reference[id(pair)] for pair in part])
            yield self.beta * (sums - reference)
