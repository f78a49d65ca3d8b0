"""The processes that train one annotator together, as torchrun starts them; or one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from cwpo_trainer.annotators.forward import E, Pass
from cwpo_trainer.run import process


class Ranks:
    """Shares out the examples of a step, and adds up what each process made of its own.

    Gradients are summed, so that any number of processes does as one process on all examples.

    Args:
        device: that the process computes on.
        share_model: whether each holds a part of the model, gathered in each forward pass.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, *, share_model: bool = False
    ) -> None:
        self.share_model = share_model
        self.rank = rank
        self.size = size
        self.device = device

    def share(self, examples: Sequence[E]) -> list[E]:
        """The examples of this process, about as many tokens as those of any other.

        Neighbours stay together, so that a process reads what they share once.
        """
        if self.size == 1:
            return list(examples)
        ends = [*accumulate(example.tokens for example in examples)]
        total = ends[-1] if ends else 0
        # The process in whose part of all tokens the middle of an example lies.
        return [
            example
            for example, end in zip(examples, ends, strict=True)
            if (2 * end - example.tokens) * self.size // (2 * total) == self.rank
        ]

    def read(
        self, examples: Sequence[E], passes: Callable[[Sequence[E]], list[Pass]]
    ) -> Iterator[tuple[Tensor, int]]:
        """What the passes over this process's share of the examples give.

        Processes that share a model all make as many passes: those with fewer end with passes over
        the shortest example, which do not count.

        Yields: the result of each pass, and 1 if it counts, or 0.
        """
        own, spare = passes(self.share(examples)), []
        if self.share_model:
            shortest = min(examples, key=lambda example: example.tokens)
            spare = passes([shortest]) * (self.most(len(own)) - len(own))
        for counts, some in ((1, own), (0, spare)):
            for read in some:
                yield read(), counts

    def sum_gradients(self, model: Any) -> None:
        """Give every process the sum of the gradients of all.

        A shared model has it already.
        """
        if self.size == 1 or self.share_model:
            return
        works = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                works.append(distributed.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()

    def total(self, *values: float) -> list[float]:
        """The sums of each value over the processes."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float32, device=self.device)
        distributed.all_reduce(sums)
        result: list[float] = sums.tolist()
        return result

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes."""
        return any(self.total(flag))

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        values = torch.tensor(value, device=self.device)
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return int(values)

    def least(self, value: int) -> int:
        """The smallest of the processes' values."""
        return -self.most(-value)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.any_rank(False)

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values of all processes, concatenated."""
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, values)
        return np.concatenate(parts)


@contextmanager
def connected_ranks(device: str, *, share_model: bool) -> Iterator[Ranks]:
    """The processes that torchrun started, connected until the block ends."""
    rank, size = int(os.environ.get("RANK", "0")), process.world_size()
    if size == 1:
        yield Ranks(rank, size, torch.device(device))
        return
    is_cuda = device == "cuda"
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if is_cuda else "gloo")
    try:
        yield Ranks(rank, size, torch.device(device), share_model=share_model)
    finally:
        distributed.destroy_process_group()
