"""Scores with a sequence-classification model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cwpo.errors import ConfigError
from cwpo_annotator.backends import int8, layers, layout, shared_prefix
from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.backends.cores import Cores
from cwpo_annotator.backends.memory import MemoryBudget
from cwpo_annotator.model import load_model
from cwpo_annotator.packing import Row, length_sorted, pack_pairs, pack_texts
from cwpo_annotator.threads import use_threads

Item = TypeVar("Item")
Pass = TypeVar("Pass")

# Tokens a forward pass, padding included: on a CPU a few texts at a time stay in the caches, and
# their activations are small enough for the allocator to use the same memory again. Fewer texts at
# a time are nearer in length, and padded the less.
_TOKEN_BUDGETS = {"cpu": 1024, "mps": 8192, "cuda": 32768}
_PADDED_TOKEN_BUDGETS = _TOKEN_BUDGETS | {"cpu": 512}


class TorchBackend:
    """Packed rows with shared prompts for decoders; padded, length-sorted batches for the rest.

    Args:
        folder: a checkpoint with one output, in safetensors.
        pad_token_id: of the encoder; a padded text's score is read at its last other token.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU. The head is float32 always: a
            bfloat16 score has eight bits, and would tie most close pairs. int8 rounds the linear
            layers and computes the rest in float32, on a CPU only.
        device: cuda, mps, cpu, or auto for the best there is.
        token_budget: tokens a forward pass, padding included; None chooses by the device. It is
            halved whenever the device runs out of memory.
        threads: on a CPU, of the whole process; None takes the physical cores there are.
    Raises: CheckpointError for weights that cannot be loaded or have no single output;
        ConfigError for int8 on another device.
    """

    name = "torch"
    # Share of padding in the last call, 0 where rows are packed.
    padding = 0.0

    def __init__(
        self,
        folder: Path,
        *,
        pad_token_id: int,
        dtype: str = "auto",
        device: str = "auto",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.device = best_device() if device == "auto" else device
        kind = torch.device(self.device).type
        self.dtype = ("bfloat16" if kind == "cuda" else "float32") if dtype == "auto" else dtype
        is_int8 = self.dtype == "int8"
        if is_int8 and kind != "cpu":
            raise ConfigError(f"dtype int8 is for CPUs, not for {self.device}: use bfloat16")
        self.pad_token_id = pad_token_id
        dtype_of_rest = torch.float32 if is_int8 else getattr(torch, self.dtype)
        model = load_model(folder, dtype=dtype_of_rest, pad_token_id=pad_token_id)
        self.model = model.to(self.device)
        _keep_head_in_float32(self.model)
        if kind == "cpu":
            use_threads(threads)
        are_apart = kind == "cpu" and _keeps_no_state(self.model)
        self._cores = Cores(torch.get_num_threads() if are_apart else 1)
        if not is_int8:
            layers.replace(self.model.base_model, token_budget or _TOKEN_BUDGETS.get(kind, 8192))
        self.shares_prompts = share_prompts(self.model)
        budgets = _TOKEN_BUDGETS if self.shares_prompts else _PADDED_TOKEN_BUDGETS
        self._memory = MemoryBudget(token_budget or budgets.get(kind, 8192))
        if is_int8:
            int8.round_weights(self.model.base_model)

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

    def check(self) -> None:
        """A model in this process is there as long as the process is."""

    def close(self) -> None:
        """Free the model."""
        self._cores.close()
        del self.model

    def _score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        if self.shares_prompts:
            rows = self._passes(pack_pairs, pairs, [pair.tokens - pair.shared for pair in pairs])
            return self._score_packed(rows, 2 * len(pairs)).reshape(-1, 2)
        sequences = [ids for pair in pairs for ids in (pair.a, pair.b)]
        return self._score_padded(sequences).reshape(-1, 2)

    def _score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        sequences = [text.ids for text in texts]
        if self.shares_prompts:
            rows = self._passes(pack_texts, sequences, [len(ids) for ids in sequences])
            return self._score_packed(rows, len(texts))
        return self._score_padded(sequences)

    def _passes(
        self,
        pack: Callable[[Sequence[Item], int], Iterable[Pass]],
        items: Sequence[Item],
        sizes: Sequence[int],
    ) -> list[Pass]:
        """Items packed within the token budget; where there are enough, as many for each core."""
        if len(items) >= self._cores.count:
            passes = [*pack(items, self._cores.share(sizes, self.token_budget))]
            if len(passes) >= self._cores.count:
                return passes
        return [*pack(items, self.token_budget)]

    def _score_packed(self, rows: Iterable[Row], count: int) -> NDArray[np.float32]:
        scores = np.empty(count, np.float32)

        @torch.inference_mode()
        def score(row: Row) -> None:
            hidden = read_row(self.model, row)
            # Equal texts are read at one place, and rounding may differ from place to place.
            places, of_text = np.unique(row.last, return_inverse=True)
            scores[row.texts] = self.model.score(hidden[places])[:, 0].cpu().numpy()[of_text]

        self._cores.each(score, sorted(rows, key=lambda row: -len(row.ids)))
        return scores

    def _score_padded(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        # Each text once and in an order of its own: equal texts tie, and a pair whose responses
        # are swapped is read in the very same batches.
        texts = sorted(set(map(tuple, sequences)), key=lambda ids: (len(ids), ids))
        place = {ids: at for at, ids in enumerate(texts)}
        scores = np.empty(len(texts), np.float32)
        lengths = [len(ids) for ids in texts]
        batches = self._passes(length_sorted, lengths, lengths)
        # A batch is as wide as its first text, the longest.
        width = sum(len(rows) * len(texts[rows[0]]) for rows in batches)
        self.padding = 1 - sum(map(len, texts)) / width if width else 0.0

        @torch.inference_mode()
        def score(rows: list[int]) -> None:
            ids, mask = self._padded([texts[row] for row in rows])
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            scores[rows] = logits[:, 0].float().cpu().numpy()

        self._cores.each(score, batches)
        return scores[[place[tuple(ids)] for ids in sequences]]

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(ids) for ids in sequences)
        ids = torch.full((len(sequences), width), self.pad_token_id)
        mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            mask[row, : len(sequence)] = 1
        return ids.to(self.device), mask.to(self.device)


def best_device() -> str:
    """The fastest device that torch sees."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _keep_head_in_float32(model: torch.nn.Module) -> None:
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    for head in heads:
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _keeps_no_state(model: torch.nn.Module) -> bool:
    """Whether passes may run side by side: some rotary positions change with the longest text."""
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    return not any("dynamic" in kind or "longrope" in kind for kind in kinds)


def read_row(model: Any, row: Row) -> torch.Tensor:
    """Hidden states of a packed row, shape (tokens, width), by a model that `share_prompts`."""
    with layout.reading(row.segments, model.device):
        output = model.base_model(
            input_ids=torch.tensor([row.ids], device=model.device),
            position_ids=torch.tensor([row.positions], device=model.device),
            use_cache=False,
        )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


@torch.inference_mode()
def share_prompts(model: Any) -> bool:
    """Switch a decoder to shared prompts, where its hidden states then prove to be the same.

    Encoders, and decoders whose attention goes its own ways, stay as they are.
    """
    heads = (getattr(model, name, None) for name in ("score", "lm_head"))
    if not any(isinstance(head, torch.nn.Linear) for head in heads):
        return False
    before = model.config._attn_implementation
    texts = torch.arange(3, 15), torch.cat((torch.arange(3, 9), torch.arange(20, 24)))
    (row,) = pack_pairs([EncodedPair(texts[0].tolist(), texts[1].tolist(), shared=6)], 1024)
    ids = (texts[index] for index in row.texts)
    own = [model.base_model(input_ids=text[None].to(model.device)) for text in ids]
    expected = torch.stack([output.last_hidden_state[0, -1] for output in own]).float()
    for implementation in (shared_prefix.AT_ONCE, shared_prefix.BY_RUNS):
        try:
            model.set_attn_implementation(implementation)
            error = (read_row(model, row)[row.last].float() - expected).norm() / expected.norm()
        except (TypeError, ValueError, RuntimeError, LookupError):
            continue
        # Another mask or other positions change hidden states by the order of their size.
        if error < (1e-3 if model.dtype == torch.float32 else 0.1):
            return True
    model.set_attn_implementation(before)
    return False
