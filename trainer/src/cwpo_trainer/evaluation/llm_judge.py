"""Win rate by an LLM judge (App. J.2), which is asked in both orders.

A judge that prefers whatever stands first draws: a policy wins a prompt if it is preferred in both
orders, and loses it if it is in neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import CwpoError
from cwpo.types import Prompt
from cwpo_trainer.evaluation.chat_endpoint import ChatEndpoint
from cwpo_trainer.evaluation.judge_prompts import preferred, question
from cwpo_trainer.evaluation.kept_replies import KeptReplies
from cwpo_trainer.evaluation.metrics import Estimate, LlmJudgement, WinRate
from cwpo_trainer.intervals import bootstrap, wilson
from cwpo_trainer.run.chunks import chunks
from cwpo_trainer.settings.evaluation import JudgePrompt, LlmJudging

_SEED = 0
# Questions for each request at a time, from one count that the user sees to the next.
_ROUNDS = 4


@contextmanager
def llm_judge(settings: LlmJudging, kept: Path) -> Iterator[LlmJudge | None]:
    """The judge that settings name, which has replied once; None if they name none.

    Args:
        kept: file of its replies, which is there if an earlier run failed.
    Raises: CwpoError, soon, where it does not reply.
    """
    if settings.llm_judge is None or settings.llm_judge_model is None:
        yield None
        return
    endpoint = ChatEndpoint(settings.llm_judge, settings.llm_judge_model)
    with closing(endpoint):
        endpoint.check()
        with closing(KeptReplies(kept, endpoint.model)) as replies:
            yield LlmJudge(
                endpoint,
                replies,
                prompt=settings.llm_judge_prompt,
                requests=settings.llm_judge_requests,
            )


class LlmJudge:
    """Compares answers by asking a language model.

    Args:
        kept: what it replied before, and where replies are kept.
        prompt: which of the two prompts.
        requests: number of questions at a time.
    """

    def __init__(
        self, endpoint: ChatEndpoint, kept: KeptReplies, *, prompt: JudgePrompt, requests: int
    ) -> None:
        self._endpoint = endpoint
        self._kept = kept
        self._prompt = prompt
        self._requests = requests

    def judgement(
        self,
        prompts: Sequence[Prompt],
        answers: Mapping[str, Sequence[str]],
        others: Sequence[str],
        *,
        against: str,
        baseline: str,
    ) -> LlmJudgement:
        """How often each policy's answers are preferred to others.

        Args:
            answers: one to each prompt, by name of the policy; others: what they are compared with.
            against: what the others are, for the reader.
            baseline: the policy whose win rate the others' are compared with.
        Raises: CwpoError where the endpoint fails; the replies so far are kept.
        """
        of_policies = {
            name: [*zip(prompts, each, others, strict=True)] for name, each in answers.items()
        }
        asked = {
            text for each in of_policies.values() for one in each for text in self._questions(*one)
        }
        missing = sorted(text for text in asked if text not in self._kept)
        try:
            self._ask(missing)
        except CwpoError as error:
            done = sum(text in self._kept for text in asked)
            raise CwpoError(
                f"{error}. {done:,} of {len(asked):,} replies are kept, and not asked for again by "
                "the same command"
            ) from error
        wins = {
            name: np.array([self._win(*one) for one in each]) for name, each in of_policies.items()
        }
        return LlmJudgement(
            model=self._endpoint.model,
            url=self._endpoint.url,
            prompt=self._prompt,
            against=against,
            questions=len(asked),
            questions_kept=len(asked) - len(missing),
            prompt_tokens=sum(self._kept[text].prompt_tokens for text in asked),
            completion_tokens=sum(self._kept[text].completion_tokens for text in asked),
            policies={
                name: _win_rate(
                    each,
                    unclear=sum(map(self._unclear, of_policies[name])),
                    of_baseline=wins.get(baseline) if name != baseline else None,
                )
                for name, each in wins.items()
            },
        )

    def _questions(self, prompt: Prompt, answer: str, other: str) -> list[str]:
        """With the answer first, and second; none where there is nothing to compare."""
        if not answer.strip() or not other.strip() or answer.strip() == other.strip():
            return []
        return [
            question(self._prompt, prompt, answer, other),
            question(self._prompt, prompt, other, answer),
        ]

    def _win(self, prompt: Prompt, answer: str, other: str) -> float:
        """1 for a win, 0 for a loss, a half for a tie; an empty answer loses to any other."""
        questions = self._questions(prompt, answer, other)
        if not questions:
            return 0.5 + (bool(answer.strip()) - bool(other.strip())) / 2
        votes = [preferred(self._kept[text].text) for text in questions]
        return 1.0 if votes == ["a", "b"] else 0.0 if votes == ["b", "a"] else 0.5

    def _unclear(self, one: tuple[Prompt, str, str]) -> int:
        """In how many orders the judge did not say which is better."""
        return sum(preferred(self._kept[text].text) is None for text in self._questions(*one))

    def _ask(self, questions: Sequence[str]) -> None:
        with ThreadPoolExecutor(self._requests, thread_name_prefix="llm-judge") as pool:
            work = f"ask {self._endpoint.model}"
            for part in chunks(questions, _ROUNDS * self._requests, work=work, unit="comparisons"):
                _finish(pool.map(self._ask_one, part))

    def _ask_one(self, text: str) -> None:
        self._kept.keep(text, self._endpoint.ask(text))


def _finish(results: Iterable[None]) -> None:
    """Wait for all; raises what one of them raised."""
    for _ in results:
        pass


def _win_rate(
    wins: NDArray[np.float64], *, unclear: int, of_baseline: NDArray[np.float64] | None
) -> WinRate:
    rate = float(wins.mean())
    low, high = wilson(rate, len(wins))
    difference = None
    if of_baseline is not None:
        least, most = bootstrap(wins - of_baseline, seed=_SEED)
        difference = Estimate(
            value=float((wins - of_baseline).mean()), low=least, high=most, prompts=len(wins)
        )
    return WinRate(
        rate=Estimate(value=rate, low=low, high=high, prompts=len(wins)),
        wins=int((wins == 1).sum()),
        ties=int((wins == 0.5).sum()),
        losses=int((wins == 0).sum()),
        unclear=unclear,
        difference=difference,
    )
