"""Answers that a policy samples: batched generation, seeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from cwpo.types import Prompt
from cwpo_annotator.backends.in_process import best_device
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer import policy, runtime
from cwpo_trainer.formatting import Formatter


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    max_new_tokens: of an answer; temperature: 0 is greedy; top_p: share of the probability that
    the likeliest tokens have to hold to be drawn from; batch_size: answers at once.
    """

    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int
    top_p: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Of transformers' generate, which would otherwise take the model's own settings."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


class LoadedPolicy:
    """A policy ready to answer, on the best device, with its formatter."""

    def __init__(self, path: str, dtype: runtime.DType) -> None:
        folder = resolve(path)
        self.tokenizer = policy.load_tokenizer(folder)
        self.model: Any = policy.load(folder, dtype=dtype).to(best_device()).eval()
        self.formatter = Formatter(self.tokenizer)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, title: str) -> list[str]:
        """One answer to each prompt, in order; the same ones for the same seed."""
        torch.manual_seed(sampling.seed)
        answers: list[str] = []
        for part in chunks(prompts, sampling.batch_size, title):
            ids, mask = self._openings(part)
            generated = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling.arguments(),
            )
            texts = self.tokenizer.batch_decode(
                generated[:, ids.shape[1] :], skip_special_tokens=True
            )
            answers += [
                self.formatter.answer(prompt, text)
                for prompt, text in zip(part, texts, strict=True)
            ]
        return answers

    def _openings(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids padded on the left, and their mask, each (prompts, longest)."""
        openings = self.formatter.opening_ids(prompts)
        width = max(map(len, openings))
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, opening in enumerate(openings):
            ids[row, width - len(opening) :] = torch.as_tensor(opening)
            mask[row, width - len(opening) :] = 1
        return ids, mask


def chunks(items: Sequence[Any], size: int, title: str) -> Iterator[Any]:
    """The items in parts of at most `size`, with progress on stderr."""
    starts = range(0, len(items), size)
    for start in track(starts, description=title, console=Console(stderr=True)):
        yield items[start : start + size]
