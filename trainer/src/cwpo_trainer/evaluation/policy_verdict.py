"""What follows from the figures of policies: which is better, and what its wins rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cwpo_trainer.evaluation.comparison import REFERENCE
from cwpo_trainer.evaluation.independence import Independence
from cwpo_trainer.evaluation.metrics import (
    Comparison,
    Estimate,
    LlmJudgement,
    PolicyMetrics,
)

# Resamples of fewer prompts are too alike for an interval that can be trusted.
_FEWEST_PROMPTS = 30
# Ratios to the baseline below or above which a reader should look at the answers.
_LENGTHS = (0.8, 1.25)
_LEAST_VARIETY = 0.9
_MANY_CUT = 0.2


def verdict(
    metrics: Mapping[str, PolicyMetrics],
    independence: Independence,
    by_llm: LlmJudgement | None = None,
) -> list[str]:
    """Sentences that a person can act on, those on who is better first."""
    return [
        *(
            _compared(name, each, metrics.get(each.comparison.baseline), each.comparison)
            for name, each in metrics.items()
            if each.comparison is not None
        ),
        *(_by_llm(by_llm) if by_llm is not None else ()),
        *(sentence for name, each in metrics.items() for sentence in _suspicions(name, each)),
        *_judge(independence),
    ]


def _compared(
    name: str, one: PolicyMetrics, other: PolicyMetrics | None, compared: Comparison
) -> str:
    """Of a policy and the baseline; the latter has no figures of its own if it is the reference."""
    against = "" if other is None else f" against {other.win_share:.1%}"
    baseline = _listed([compared.baseline])
    figures = (
        f"GRA {one.win_share:.1%}{against}, a difference of {points(compared.win_share)} on "
        f"{compared.win_share.prompts:,} prompts"
    )
    if compared.win_share.prompts < _FEWEST_PROMPTS:
        return (
            f"{name} against {baseline}: {figures}. With fewer than {_FEWEST_PROMPTS} "
            "prompts that tells nothing: raise --prompts."
        )
    if compared.win_share.low > 0:
        return f"{name} is better than {baseline}: {figures}."
    if compared.win_share.high < 0:
        return f"{name} is worse than {baseline}: {figures}."
    needed = (
        ""
        if compared.prompts_needed is None
        else f"; about {compared.prompts_needed:,} would show a difference of this size"
    )
    return (
        f"Whether {name} is better than {baseline}, these prompts are too few to tell: "
        f"{figures}{needed}."
    )


def _by_llm(found: LlmJudgement) -> Iterator[str]:
    others = "the chosen responses"
    if found.against != "chosen":
        others = f"those of {_listed([found.against])}"
    for name, each in found.policies.items():
        rate = each.rate
        told = (
            f"The LLM judge {found.model} prefers answers of {name} to {others} on "
            f"{rate.value:.1%} of {rate.prompts:,} prompts (95 % interval {rate.low:.1%} to "
            f"{rate.high:.1%})"
        )
        if each.difference is not None:
            told += f", a difference of {points(each.difference)} from the baseline"
        elif rate.low <= 0.5 <= rate.high or rate.prompts < _FEWEST_PROMPTS:
            told += ", which does not tell which are better"
        yield f"{told}."


def points(difference: Estimate) -> str:
    """A difference of two shares, in percentage points, with its interval."""
    return (
        f"{100 * difference.value:+.1f} points (95 % interval {100 * difference.low:+.1f} to "
        f"{100 * difference.high:+.1f})"
    )


def _suspicions(name: str, one: PolicyMetrics) -> Iterator[str]:
    """What may give away a policy that pleases the judge rather than people."""
    compared, writing = one.comparison, one.writing
    if compared is not None and compared.length_ratio is not None:
        shortest, longest = _LENGTHS
        if not shortest <= compared.length_ratio <= longest:
            told = (
                f"Answers of {name} are {compared.length_ratio:.2g} times as long as those of "
                f"{_listed([compared.baseline])}, and longer on {compared.longer:.1%} of prompts."
            )
            if compared.higher_if_not is not None:
                told += f" Where they are not, they score higher on {compared.higher_if_not:.1%}."
            yield told
    if writing is None:
        return
    if writing.ended < 1 - _MANY_CUT:
        yield (
            f"{1 - writing.ended:.1%} of the answers of {name} were cut at --max-new-tokens, and "
            "judged unfinished."
        )
    if min(writing.distinct, writing.distinct_bigrams) < _LEAST_VARIETY:
        yield (
            f"Answers of {name} repeat themselves: {writing.distinct:.1%} of them are different, "
            f"and {writing.distinct_bigrams:.1%} of the pairs of words in one."
        )


def _judge(independence: Independence) -> Iterator[str]:
    if independence.labelled:
        yield (
            f"The judge labelled the training data of {_listed(independence.labelled)}: that these "
            "please it shows that training worked, not that they are better."
        )
    if independence.unknown:
        yield (
            f"Who labelled the training data of {_listed(independence.unknown)} is not known. If "
            "it was the judge, its scores are no evidence."
        )


def _listed(names: list[str]) -> str:
    return ", ".join("the " + name if name == REFERENCE else name for name in names)
