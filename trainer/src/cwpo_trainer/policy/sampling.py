"""Answers that a policy samples: batched generation, seeded."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cwpo.types import Prompt
from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.backends.torch.rows.packing import length_sorted
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer.policy.end_of_turn import stop_at_end_of_turn, stops_of
from cwpo_trainer.policy.formatting import Formatter, TokenisedText
from cwpo_trainer.policy.loading import load, load_tokenizer
from cwpo_trainer.policy.packed_model import read_packed
from cwpo_trainer.run.chunks import chunks
from cwpo_trainer.settings.mixins import DType


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    max_new_tokens: of an answer; temperature: 0 is greedy; top_p: share of the probability that
    the likeliest tokens have to hold to be drawn from; batch_size: answers at once; token_budget:
    their tokens at most, padding and all of max_new_tokens included, None for any number.
    """

    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int
    top_p: float = 1.0
    token_budget: int | None = None

    def batches(self, lengths: Sequence[int]) -> list[Sequence[int]]:
        """The places of prompts of these lengths, those of similar length together.

        The longest come first: what does not fit in memory fails at once.
        """
        grown = [length + self.max_new_tokens for length in lengths]
        # Without a budget, the number of batches is that of prompts alone, on which processes that
        # share the policy agree.
        budget = self.token_budget or sum(grown) * max(grown, default=0)
        return [
            batch[start : start + self.batch_size]
            for batch in length_sorted(grown, budget)
            for start in range(0, len(batch), self.batch_size)
        ]

    def arguments(self) -> dict[str, Any]:
        """Of transformers' generate, which would otherwise take the model's own settings."""
        plain = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        if self.temperature == 0:
            return {"do_sample": False, **plain}
        return {
            **plain,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """What a policy wrote to a prompt.

    text: as the responses of training data are; tokens: of the prompt, and all that was generated.
    has_ended: whether the policy ended the answer itself, rather than max_new_tokens.
    """

    text: str
    tokens: TokenisedText
    has_ended: bool


class AnsweringPolicy(ABC):
    """A policy with its tokenizer and formatter; it answers as it is whenever it is asked.

    Args:
        config: of the model's generation; it stops at the end of a turn, too, from now on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> None:
        self.tokenizer = tokenizer
        self.formatter = Formatter(tokenizer)
        stop_at_end_of_turn(config, tokenizer)
        self.stops = stops_of(config)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, work: str | None) -> list[str]:
        """The texts of `answers`."""
        return [answer.text for answer in self.answers(prompts, sampling, work)]

    def answers(
        self, prompts: Sequence[Prompt], sampling: Sampling, work: str | None
    ) -> list[SampledAnswer]:
        """One answer to each prompt, in order; the same ones for the same seed.

        Args:
            work: what is done, for the user; None shows nothing.
        """
        openings = self.formatter.opening_ids(prompts)
        continued = self.continued(openings, sampling, work)
        found = {at: self._answer(prompts[at], openings[at], ids) for at, ids in continued}
        return [found[at] for at in range(len(prompts))]

    @abstractmethod
    def continued(
        self, openings: Sequence[list[int]], sampling: Sampling, work: str | None
    ) -> Iterator[tuple[int, list[int]]]:
        """The places of prompts in any order, with the tokens that are generated behind each.

        Args:
            openings: token ids of the prompts.
            work: what is done, for the user; None shows nothing.
        """

    def _answer(self, prompt: Prompt, opening: list[int], ids: list[int]) -> SampledAnswer:
        """The answer in generated tokens, behind whose first end there is padding."""
        end = next((at for at, token in enumerate(ids) if token in self.stops), None)
        written = ids if end is None else ids[: end + 1]
        text = str(self.tokenizer.decode(written, skip_special_tokens=True))
        return SampledAnswer(
            self.formatter.answer(prompt, text),
            TokenisedText(opening, written),
            has_ended=end is not None,
        )


class TransformersPolicy(AnsweringPolicy):
    """A policy that transformers samples from.

    Args:
        is_shared: whether processes hold a part of it each: all then have to be asked at the same
            time for equally many answers, and go on with forward passes until the last has ended.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, is_shared: bool = False
    ) -> None:
        super().__init__(tokenizer, model.generation_config)
        self.model = model
        self._is_shared = is_shared

    def continued(
        self, openings: Sequence[list[int]], sampling: Sampling, work: str | None
    ) -> Iterator[tuple[int, list[int]]]:
        """See AnsweringPolicy."""
        torch.manual_seed(sampling.seed)
        batches = sampling.batches([*map(len, openings)])
        for (batch,) in chunks(batches, 1, work=work, unit="batches"):
            yield from zip(
                batch, self._generated([openings[at] for at in batch], sampling), strict=True
            )

    # What a model keeps of its forward passes may be read by its training.
    @torch.no_grad()
    def _generated(self, openings: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
        """What the model continues these with, padded."""
        ids, mask = padded(openings, self.tokenizer.pad_token_id, self.model.device, side="left")
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            synced_gpus=self._is_shared,
            **sampling.arguments(),
        )
        continued: list[list[int]] = generated[:, ids.shape[1] :].tolist()
        return continued


class LoadedPolicy(TransformersPolicy):
    """A policy that is loaded to answer, on the best device."""

    def __init__(self, path: str, dtype: DType) -> None:
        folder = resolve(path)
        tokenizer = load_tokenizer(folder)
        super().__init__(load(folder, dtype=dtype).to(best_device()).eval(), tokenizer)

    @cached_property
    def reads_rows(self) -> bool:
        """Whether the model reads packed rows; see `read_packed`."""
        return read_packed(self.model, bfloat16=False) is None


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


def free_memory() -> None:
    """Free what a policy that is no longer referred to holds, before another needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
