"""What the backends with models in this process share: items laid out, and read pass by pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.backends.cores import Cores
from cwpo_annotator.backends.memory import MemoryBudget
from cwpo_annotator.backends.shared_prefix import share_prompts
from cwpo_annotator.packing import Row, length_sorted, pack_pairs, pack_texts
from cwpo_annotator.threads import use_threads

# Tokens a forward pass, padding included: on a CPU a few texts at a time stay in the caches, and
# their activations are small enough for the allocator to use the same memory again. Fewer texts at
# a time are nearer in length, and padded the less.
_TOKEN_BUDGETS = {"cpu": 1024, "mps": 8192, "cuda": 32768}
_PADDED_TOKEN_BUDGETS = _TOKEN_BUDGETS | {"cpu": 512}


class InProcessBackend(ABC):
    """Packed rows with shared prompts where all models can; padded, length-sorted batches else.

    On a CPU, passes go side by side, a core each. A device that runs out of memory gets smaller
    ones, here and from then on.

    Args:
        models: that read each pass.
        device, dtype: that they compute on and in; the latter by its name.
        token_budget: tokens a pass, padding included; None chooses by the device.
        threads: on a CPU, of the whole process; None takes the physical cores there are.
    """

    name = "torch"
    # Share of padding in the last call, 0 where rows are packed.
    padding = 0.0

    def __init__(
        self,
        models: Sequence[Any],
        *,
        device: torch.device,
        dtype: str,
        token_budget: int | None,
        threads: int | None,
    ) -> None:
        if device.type == "cpu":
            use_threads(threads)
        self.device, self.dtype = str(device), dtype
        self.shares_prompts = all([share_prompts(model) for model in models])
        self._memory = MemoryBudget(token_budget or default_budget(device, self.shares_prompts))
        cores = torch.get_num_threads() if device.type == "cpu" else 1
        self._cores = Cores(cores if all(map(_keeps_no_state, models)) else 1)
        # Two passes of usual size for each core.
        self.batch_tokens = 2 * default_budget(device) * cores

    @abstractmethod
    def _of_row(self, row: Row, starts: Sequence[int]) -> torch.Tensor:
        """The score of each text of a row, in the order of `row.texts`, where prompts are shared.

        Args:
            starts: where the response of each text starts, in its own tokens.
        """

    @abstractmethod
    def _of_batch(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """The score of each text."""

    @property
    def token_budget(self) -> int:
        """Tokens a forward pass, padding included."""
        return self._memory.tokens

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        """Shape (n, 2); see Backend."""
        return self._memory.score(pairs, self._score_pairs)

    def score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        """Shape (n,); see Backend."""
        return self._memory.score(texts, self._score_texts)

    def check(self) -> None:  # noqa: B027 - a default, not a duty
        """A model in this process is there as long as the process is."""

    def close(self) -> None:
        """End the threads that compute."""
        self._cores.close()

    def _score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        starts = [start for pair in pairs for start in (pair.start, pair.start)]
        if self.shares_prompts:
            rows = pack_pairs(pairs, self.token_budget, multiple_of=self._cores.count)
            scores = self._score_packed(rows, starts)
        else:
            scores = self._score_padded([ids for pair in pairs for ids in (pair.a, pair.b)], starts)
        return scores.reshape(-1, 2)

    def _score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        sequences, starts = [text.ids for text in texts], [text.start for text in texts]
        if self.shares_prompts:
            rows = pack_texts(sequences, self.token_budget, multiple_of=self._cores.count)
            return self._score_packed(rows, starts)
        return self._score_padded(sequences, starts)

    def _score_packed(self, rows: Iterable[Row], starts: Sequence[int]) -> NDArray[np.float32]:
        scores = np.empty(len(starts), np.float32)

        @torch.inference_mode()
        def score(row: Row) -> None:
            of_row = self._of_row(row, [starts[text] for text in row.texts])
            scores[row.texts] = of_row.float().cpu().numpy()

        self._cores.each(score, [*rows])
        return scores

    def _score_padded(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> NDArray[np.float32]:
        # Each text once and in an order of its own: equal texts tie, and a pair whose responses
        # are swapped is read in the very same batches.
        asked = [
            (len(ids), tuple(ids), start) for ids, start in zip(sequences, starts, strict=True)
        ]
        texts = sorted(set(asked))
        place = {text: at for at, text in enumerate(texts)}
        scores = np.empty(len(texts), np.float32)
        lengths = [length for length, _, _ in texts]
        batches = length_sorted(lengths, self.token_budget, multiple_of=self._cores.count)
        # A batch is as wide as its first text, the longest.
        width = sum(len(rows) * lengths[rows[0]] for rows in batches)
        self.padding = 1 - sum(lengths) / width if width else 0.0

        @torch.inference_mode()
        def score(rows: list[int]) -> None:
            ids, starts_of = [texts[row][1] for row in rows], [texts[row][2] for row in rows]
            scores[rows] = self._of_batch(ids, starts_of).float().cpu().numpy()

        self._cores.each(score, batches)
        return scores[[place[text] for text in asked]]


def best_device() -> str:
    """The fastest device that torch sees."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_budget(device: torch.device, shares_prompts: bool = True) -> int:
    """Tokens of a forward pass that is fast on the device."""
    budgets = _TOKEN_BUDGETS if shares_prompts else _PADDED_TOKEN_BUDGETS
    return budgets.get(device.type, 8192)


def _keeps_no_state(model: torch.nn.Module) -> bool:
    """Whether passes may run side by side: some rotary positions change with the longest text."""
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    return not any("dynamic" in kind or "longrope" in kind for kind in kinds)
