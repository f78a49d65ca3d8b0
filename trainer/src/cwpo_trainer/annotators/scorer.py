"""Scores with gradients: what an annotator in training makes of a batch of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.padding import padded
from cwpo_annotator.backends.shared_prefix import read_row, share_prompts
from cwpo_annotator.packing import Row, pack_pairs

# Tokens a forward pass, padding included; it sets memory and speed, not the result.
TOKEN_BUDGETS = {"cpu": 1024, "cuda": 65536}


class PairScorer(Protocol):
    """What a model in training gives for pairs; one for each kind of annotator."""

    @property
    def model(self) -> Any:
        """The module whose parameters are trained."""
        ...

    def scores(self, pairs: Sequence[EncodedPair]) -> Iterator[Tensor]:
        """Scores of a and b, float32, shape (part, 2): a tensor a forward pass, in any order."""
        ...

    def measure(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
        """The margins without gradients or dropout, shape (pairs,), in any order."""
        ...


class Scorer:
    """Reads pairs with a sequence-classification model, on the device that the model is on.

    A decoder reads the prompt of a pair once for both responses, in rows without padding, as it
    does when it serves; other models read padded batches of like lengths.

    Args:
        pad_token_id: of the encoder; a padded text's score is read at its last other token.
        bfloat16: whether the backbone computes in it. The head is float32 always: a bfloat16 score
            has eight bits, too few to tell close responses apart.
    """

    def __init__(self, model: Any, pad_token_id: int, *, bfloat16: bool) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.bfloat16 = bfloat16
        self.token_budget = TOKEN_BUDGETS.get(model.device.type, 8192)
        self._attention = model.config._attn_implementation
        _keep_head_in_float32(model)
        model.eval()
        # The packed attention has no dropout of its own.
        self.shares_prompts = not getattr(model.config, "attention_dropout", 0) and share_prompts(
            model
        )

    def scores(self, pairs: Sequence[EncodedPair]) -> Iterator[Tensor]:
        """Scores of a and b, float32, shape (part, 2): a tensor a forward pass, in any order."""
        if self.shares_prompts:
            for row in pack_pairs(pairs, self.token_budget):
                with arithmetic(self.model, bfloat16=self.bfloat16):
                    hidden = read_row(self.model, row)
                yield a_and_b(row, self.model.score(hidden[row.last])[:, 0])
        else:
            for part in like_lengths(pairs, self.token_budget):
                yield self._of_padded(part)

    @torch.no_grad()
    def measure(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
        """The margins without gradients or dropout, shape (pairs,), in any order."""
        self.model.eval()
        parts = [part.cpu().numpy() for part in self.scores(pairs)]
        self.model.train()
        margins = [part[:, 0] - part[:, 1] for part in parts]
        return np.concatenate([np.empty(0), *margins]).astype(np.float64)

    def restore(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._attention)

    def _of_padded(self, pairs: Sequence[EncodedPair]) -> Tensor:
        texts = [*(pair.a for pair in pairs), *(pair.b for pair in pairs)]
        ids, mask = padded(texts, self.pad_token_id, self.model.device)
        with arithmetic(self.model, bfloat16=self.bfloat16):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        scores: Tensor = logits[:, 0].float()
        return scores.view(2, -1).T


def a_and_b(row: Row, of_texts: Tensor) -> Tensor:
    """What belongs to the texts of a packed row, shape (2 pairs,), as columns a and b."""
    # Texts 2i and 2i + 1 are a and b of pair i, and stand side by side in either order.
    order = torch.tensor(row.texts).view(-1, 2).argsort(dim=1)
    return of_texts.view(-1, 2).gather(1, order.to(of_texts.device))


def arithmetic(model: Any, *, bfloat16: bool) -> AbstractContextManager[None]:
    """Mixed precision on the model's device where it is asked for."""
    return torch.autocast(model.device.type, torch.bfloat16) if bfloat16 else nullcontext()


def like_lengths(pairs: Sequence[EncodedPair], budget: int) -> Iterator[list[EncodedPair]]:
    """The pairs in parts of like length within the token budget: little padding, same gradient."""
    part: list[EncodedPair] = []
    for pair in sorted(pairs, key=_width, reverse=True):
        if part and (len(part) + 1) * 2 * _width(part[0]) > budget:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def _width(pair: EncodedPair) -> int:
    return max(len(pair.a), len(pair.b))


def _keep_head_in_float32(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == 1:
            head: Any = module
            head.forward = _float32(head)


def _float32(head: torch.nn.Linear) -> Any:
    def forward(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.float(), head.weight, head.bias)

    return forward
