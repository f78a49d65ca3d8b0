"""Forward passes of annotators in training: their size, number format and results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cwpo.errors import CwpoError
from cwpo_annotator.backends.torch.hardware.memory import MemoryBudget
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.plan.row_sizes import row_tokens


class Example(Protocol):
    """What a model is trained on, one of many: a pair of responses, or a single response."""

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        ...


E = TypeVar("E", bound=Example)
H = TypeVar("H", bound=Hashable)
T = TypeVar("T")

Pass = Callable[[], Tensor]
"""A forward pass that is prepared, and read when it is called."""


class Root(torch.nn.Module):
    """Holds a model, and makes forward passes with it: a call is one pass.

    What FSDP gathers before a pass, and frees after it, is what the call of a module computes with.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, read: Pass) -> Tensor:
        """What the pass gives, which is no view: FSDP hooks into the tensor itself."""
        return read().clone()


class PassBudget:
    """Maximum number of tokens in a forward pass, padding included, halved when memory runs out.

    It sets memory and speed, not the result.

    Args:
        asked: what --token-budget says; None chooses by the device.
        device_type: cuda, mps or cpu.
        repeats: whether a process can make a pass again by itself; not where a model is shared,
            since the others have gone on to the next gathering of weights.
    """

    def __init__(self, asked: int | None, device_type: str, *, repeats: bool = True) -> None:
        self._repeats = repeats
        self._memory = MemoryBudget(asked or row_tokens(device_type))
        self._budgets_together = 2 if asked is None and device_type == "cpu" else 1

    @property
    def tokens(self) -> int:
        """Maximum number of tokens in a pass, unless a single pair or text has more."""
        return self._memory.tokens

    @property
    def together(self) -> int:
        """Tokens that texts with a common beginning may have in a row.

        To read a long prompt again for some of its responses costs more than a longer row.
        """
        return self._budgets_together * self.tokens

    def fit(self, compute: Callable[[], T], *, longest: int) -> T:
        """What `compute` returns, called again with smaller passes whenever memory runs out.

        Args:
            longest: tokens of the longest pair or text that it reads.
        Raises: CwpoError if the longest one does not fit by itself, or nothing can be repeated.
        """
        result = self._memory.fit(compute, at_least=longest if self._repeats else self.tokens)
        if result is None and self.tokens > longest:
            raise CwpoError(
                f"out of memory: a forward pass may have {self.tokens:,} tokens, and processes "
                "that share a model cannot repeat one with fewer; start again (or --resume) with "
                f"--token-budget {max(self.tokens // 2, longest)}"
            )
        if result is None:
            raise CwpoError(
                f"out of memory: a pair of {longest:,} tokens does not fit by itself; try "
                "--gradient-checkpointing, --lora, several GPUs with --sharding fsdp2, or a "
                "smaller --max-length"
            )
        return result


def most_tokens(examples: Sequence[Example]) -> int:
    """Tokens of the longest example; 0 without any."""
    return max((example.tokens for example in examples), default=0)


def mixed_precision(model: Any, *, bfloat16: bool) -> AbstractContextManager[None]:
    """Computes the model's matrix products in bfloat16 where that is asked for."""
    return torch.autocast(model.device.type, torch.bfloat16) if bfloat16 else nullcontext()


def of_a_and_b(row: Row, of_texts: Tensor) -> Tensor:
    """Values of the texts of a row of pairs, as columns a and b, in the order of `pairs_in`."""
    # Texts 2i and 2i + 1 are a and b of pair i.
    order = torch.tensor(row.texts).argsort()
    return of_texts[order.to(of_texts.device)].view(-1, 2)


def pairs_in(row: Row) -> list[int]:
    """The indices of the pairs of a row of pairs, ascending."""
    return [text // 2 for text in sorted(row.texts)[::2]]


def distinct(texts: Sequence[H]) -> tuple[list[H], list[int]]:
    """Each text once, and the place among them of each that was given."""
    numbers: dict[H, int] = {}
    places = [numbers.setdefault(text, len(numbers)) for text in texts]
    return [*numbers], places


def pair_width(pair: EncodedPair) -> int:
    """Tokens that a pair takes in a padded batch of pairs that are no longer."""
    return 2 * max(len(pair.a), len(pair.b))
