"""Scoring with models in this process, in forward passes over packed rows or padded batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cwpo_annotator.backends.base import ReadsOnce
from cwpo_annotator.backends.torch.hardware.cores import Cores
from cwpo_annotator.backends.torch.hardware.memory import MemoryBudget
from cwpo_annotator.backends.torch.hardware.threads import use_threads
from cwpo_annotator.backends.torch.kernels.replacement import replace_layers
from cwpo_annotator.backends.torch.rows.packing import length_sorted, pack_texts
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.backends.torch.rows.shared_prompts import compile_layers, share_prompts
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.scores import Scores

# Tokens a forward pass, padding included: on a CPU a few texts at a time stay in the caches, and
# their activations are small enough for the allocator to use the same memory again. Fewer texts at
# a time are nearer in length, and padded the less.
_TOKEN_BUDGETS = {"cpu": 1024, "mps": 8192, "cuda": 65536}
_PADDED_TOKEN_BUDGETS = _TOKEN_BUDGETS | {"cpu": 512, "cuda": 32768}

# The texts of a pass, and their scores or embeddings, still on the device.
_Read = tuple[list[int], torch.Tensor]


class InProcessBackend(ABC):
    """Divides items into forward passes, each of which a subclass scores.

    A pass is a packed row with shared prompts if all models can read such rows, and otherwise a
    padded batch of texts of similar length. On a CPU, passes run in parallel, one on each core.
    When a device runs out of memory, this call and all later ones use smaller passes.

    Args:
        models: the models that read each pass.
        replaceable: the parts of them whose layers are replaced by faster ones.
        device: the device of the models.
        dtype: name of the models' number format.
        token_budget: maximum number of tokens in a pass, padding included; None chooses by the
            device.
        threads: CPU threads of the whole process; None uses one per physical core.
    """

    name = "torch"
    # Share of the last call's tokens that were padding; 0 where rows are packed.
    padding = 0.0

    def __init__(
        self,
        models: Sequence[Any],
        replaceable: Sequence[Any],
        *,
        device: torch.device,
        dtype: str,
        token_budget: int | None,
        threads: int | None,
    ) -> None:
        if device.type == "cpu":
            use_threads(threads)
        self.device, self.dtype = str(device), dtype
        self._reader = models[0].base_model
        switched = [share_prompts(model) for model in models]
        self.shares_prompts = all(switched)
        self.reads_once: ReadsOnce = "beginnings" if self.shares_prompts else "texts"
        for part in replaceable:
            replace_layers(part, token_budget or default_budget(device))
        if device.type == "cuda" and self.shares_prompts:
            for model in models:
                compile_layers(model)
        self._memory = MemoryBudget(token_budget or default_budget(device, self.shares_prompts))
        cores = torch.get_num_threads() if device.type == "cpu" else 1
        self._cores = Cores(cores if all(map(_keeps_no_state, models)) else 1)
        # Two passes of usual size for each core.
        self.batch_tokens = 2 * default_budget(device) * cores
        # To read a long prompt again for some of its responses costs more than a longer row.
        self._budgets_together = 2 if device.type == "cpu" and token_budget is None else 1

    @abstractmethod
    def _score_row(self, row: Row, starts: Sequence[int]) -> torch.Tensor:
        """The score of each text of a packed row, in the order of `row.texts`.

        Args:
            starts: position of the first token of the response, in each text.
        """

    @abstractmethod
    def _score_batch(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """The score of each text of a padded batch."""

    @property
    def token_budget(self) -> int:
        """Maximum number of tokens in a forward pass, padding included."""
        return self._memory.tokens

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """Values of shape (n, 2); see Backend."""
        return self._memory.score(pairs, self._score_pairs, (2,))

    def score_texts(self, texts: Sequence[EncodedText]) -> Scores:
        """Values of shape (n,); see Backend."""
        return self._memory.score(texts, self._score_texts, ())

    def embed_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """The mean over both texts of the mean of the model's last hidden states over their tokens.

        Returns: values of shape (n, width).
        """
        width = self._reader.config.get_text_config().hidden_size
        return self._memory.score(pairs, self._embed_pairs, (width,))

    def rows(self, texts: Sequence[Sequence[int]]) -> Iterator[Row]:
        """The rows in which a model that shares prompts reads these texts."""
        return pack_texts(
            texts,
            self.token_budget,
            multiple_of=self._cores.count,
            most_together=self._budgets_together * self.token_budget,
        )

    def check(self) -> None:  # noqa: B027 - a default, not a duty
        """Nothing to check: a model in this process is always available."""

    def close(self) -> None:
        """End the threads that run the passes."""
        self._cores.close()
        del self._reader

    def _score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        starts = [start for pair in pairs for start in (pair.start, pair.start)]
        texts = [ids for pair in pairs for ids in (pair.a, pair.b)]
        return self._score(texts, starts).reshape(-1, 2)

    def _score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        return self._score([text.ids for text in texts], [text.start for text in texts])

    def _embed_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        texts = [ids for pair in pairs for ids in (pair.a, pair.b)]

        @torch.inference_mode()
        def embed(rows: list[int]) -> _Read:
            ids, mask = padded([texts[row] for row in rows], 0, self.device)
            output = self._reader(input_ids=ids, attention_mask=mask)
            hidden = output.last_hidden_state.float() * mask[..., None]
            return rows, hidden.sum(1) / mask.sum(1, keepdim=True)

        of_texts = self._each_batch(embed, [len(ids) for ids in texts])
        means: NDArray[np.float32] = of_texts.reshape(len(pairs), 2, -1).mean(axis=1)
        return means

    def _score(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> NDArray[np.float32]:
        if self.shares_prompts:
            return self._score_packed(self.rows(texts), starts)
        return self._score_padded(texts, starts)

    def _score_packed(self, rows: Iterable[Row], starts: Sequence[int]) -> NDArray[np.float32]:
        @torch.inference_mode()
        def score(row: Row) -> _Read:
            scores = self._score_row(row, [starts[text] for text in row.texts])
            return row.texts, scores.float()

        passes = self._cores.each(score, [*rows], size=lambda row: len(row.ids))
        return _gathered(passes, len(starts))

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
        lengths = [length for length, _, _ in texts]

        @torch.inference_mode()
        def score(rows: list[int]) -> _Read:
            ids, starts_of = [texts[row][1] for row in rows], [texts[row][2] for row in rows]
            return rows, self._score_batch(ids, starts_of).float()

        scores = self._each_batch(score, lengths)
        return scores[[place[text] for text in asked]]

    def _each_batch(
        self, read: Callable[[list[int]], _Read], lengths: Sequence[int]
    ) -> NDArray[np.float32]:
        """What is read of texts of these lengths in padded batches, in the order of the texts."""
        batches = length_sorted(lengths, self.token_budget, multiple_of=self._cores.count)

        def padded_size(rows: Sequence[int]) -> int:
            # A batch is as wide as its first text, the longest.
            return len(rows) * lengths[rows[0]]

        width = sum(map(padded_size, batches))
        self.padding = 1 - sum(lengths) / width if width else 0.0
        return _gathered(self._cores.each(read, batches, padded_size), len(lengths))


def _gathered(passes: Sequence[_Read], count: int) -> NDArray[np.float32]:
    """What all passes have read, in the order of the texts.

    Only now is a GPU waited for: it has had the next pass to do while each was prepared.
    """
    shape = passes[0][1].shape[1:] if passes else ()
    gathered = np.empty((count, *shape), np.float32)
    for texts, of_pass in passes:
        gathered[texts] = of_pass.cpu().numpy()
    return gathered


def default_budget(device: torch.device, shares_prompts: bool = True) -> int:
    """A number of tokens in a forward pass that is fast on the device."""
    budgets = _TOKEN_BUDGETS if shares_prompts else _PADDED_TOKEN_BUDGETS
    return budgets.get(device.type, 8192)


def _keeps_no_state(model: torch.nn.Module) -> bool:
    """Whether passes may run side by side: some rotary positions change with the longest text."""
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    return not any("dynamic" in kind or "longrope" in kind for kind in kinds)
