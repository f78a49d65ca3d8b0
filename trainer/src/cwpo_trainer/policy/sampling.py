"""Answers that a policy samples: batched generation, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cwpo.types import Prompt
from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer.policy.end_of_turn import stop_at_end_of_turn
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.policy.loading import load, load_tokenizer
from cwpo_trainer.run.chunks import chunks
from cwpo_trainer.settings.mixins import DType


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


class AnsweringPolicy:
    """A policy with its tokenizer and formatter; it answers as it is whenever it is asked."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = Formatter(tokenizer)
        stop_at_end_of_turn(model, tokenizer)

    # What a model keeps of its forward passes may be read by its training.
    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, work: str | None) -> list[str]:
        """One answer to each prompt, in order; the same ones for the same seed.

        Args:
            work: what is done, for the user; None shows nothing.
        """
        torch.manual_seed(sampling.seed)
        answers: list[str] = []
        for part in chunks(prompts, sampling.batch_size, work=work, unit="answers"):
            openings = self.formatter.opening_ids(part)
            ids, mask = padded(
                openings, self.tokenizer.pad_token_id, self.model.device, side="left"
            )
            generated = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
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


class LoadedPolicy(AnsweringPolicy):
    """A policy that is loaded to answer, on the best device."""

    def __init__(self, path: str, dtype: DType) -> None:
        folder = resolve(path)
        tokenizer = load_tokenizer(folder)
        super().__init__(load(folder, dtype=dtype).to(best_device()).eval(), tokenizer)


def distinct_answers(
    policy: AnsweringPolicy,
    prompts: Sequence[Prompt],
    each: int,
    sampling: Sampling,
    work: str | None,
) -> list[list[str]]:
    """Of `each` answers sampled to a prompt the different ones in order, none of them blank.

    Args:
        work: what is done, for the user; None shows nothing.
    """
    repeated = [prompt for prompt in prompts for _ in range(each)]
    answers = policy.sample(repeated, sampling, work)
    of_prompts = (answers[at : at + each] for at in range(0, len(answers), each))
    return [list(dict.fromkeys(filter(str.strip, texts))) for texts in of_prompts]
