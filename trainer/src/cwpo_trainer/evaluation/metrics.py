"""The measures of evaluations, as they are written to run.json."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel

from cwpo.types import Certificate
from cwpo_trainer.intervals import effective_count, wilson


class Share(BaseModel):
    """A share of some pairs with its 95 % interval, which allows for pairs of one conversation."""

    value: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, values: ArrayLike, conversations: ArrayLike) -> Self:
        """The mean of values from 0 to 1.

        Args:
            values: shape (n,), n > 0.
            conversations: that of the pair of each value, as a number, shape (n,).
        """
        numbers, groups = np.asarray(values, np.float64), np.asarray(conversations)
        mean = float(numbers.mean())
        low, high = wilson(mean, effective_count(numbers, groups))
        return cls(value=mean, low=low, high=high, pairs=len(numbers))

    def __str__(self) -> str:
        return f"{self.value:.1%} (95 % interval {self.low:.1%} to {self.high:.1%})"


class ConfidenceBin(BaseModel):
    """A tenth of the pairs, sorted by confidence, and how often their labels are right.

    low, high: 95 % interval of the accuracy. These and the calibrated confidence are None where an
    earlier version measured them, and the latter for an annotator without a temperature.
    """

    pairs: int
    lowest: float
    highest: float
    mean_confidence: float
    accuracy: float
    low: float | None = None
    high: float | None = None
    mean_calibrated_confidence: float | None = None


class CoveragePoint(BaseModel):
    """How often the labels of the most confident pairs are right.

    coverage: their number, as a share of all pairs; threshold: the lowest of their confidences.
    """

    coverage: float
    threshold: float
    accuracy: Share


class AnnotatorMetrics(BaseModel):
    """Agreement with human labels.

    accuracy: share of pairs on which the annotator prefers the chosen response; a tie is half.
    low, high: its 95 % interval.
    conversations: number of conversations that the pairs are of.
    ece: expected calibration error of P(chosen is better) = (1 + confidence) / 2 over the bins.
    brier: mean square of the difference of P(label is right) to 1 for a right label, else to 0.
    calibrated_ece, calibrated_brier: the same with the calibrated confidence, if the annotator has
        a temperature.
    confidence_quantiles: at 0, 0.1, ..., 1.
    coverage: accuracy of the most confident pairs, the fewest first.
    failed: number of pairs that could not be scored; they are in none of the other figures.
    """

    pairs: int
    failed: int
    accuracy: float
    low: float | None = None
    high: float | None = None
    conversations: int | None = None
    mean_confidence: float
    ece: float
    calibrated_ece: float | None = None
    brier: float | None = None
    calibrated_brier: float | None = None
    confidence_quantiles: list[float]
    bins: list[ConfidenceBin]
    coverage: list[CoveragePoint] = []

    @property
    def summary(self) -> str:
        """The figures in one line."""
        calibrated = (
            "" if self.calibrated_ece is None else f", {self.calibrated_ece:.3f} calibrated"
        )
        return (
            f"accuracy {self.accuracy:.1%} on {self.pairs:,} pairs, mean confidence "
            f"{self.mean_confidence:.3f}, {self.bins[-1].accuracy:.1%} on the most confident "
            f"tenth, calibration error {self.ece:.3f}{calibrated}"
        )


class Bias(BaseModel):
    """How labels go with something that is true of one response and tells nothing of quality.

    All shares are of the pairs in which it is true of exactly one response.

    annotator: how often the annotator prefers that response; people: how often people do.
    accuracy_for, accuracy_against: how often the annotator agrees with people where they prefer it,
        and where they do not; None where they never or always do.
    """

    annotator: Share
    people: Share
    accuracy_for: Share | None
    accuracy_against: Share | None


class EmbeddingShift(BaseModel):
    """How well embeddings tell other triplets from the labelled pairs.

    auc: probability that a discriminant puts one of the others above one of the pairs, measured
        on halves of both that it was not fitted to: 0.5 for data alike, 1 for data apart.
    chance: what it stays below with probability 95 % if the data are alike.
    triplets: number of each that are embedded, half of them to fit the discriminant.
    here, there: the pairs and the others on the first two principal components of all.
    """

    auc: float
    chance: float
    triplets: tuple[int, int]
    here: list[tuple[float, float]]
    there: list[tuple[float, float]]


class Shift(BaseModel):
    """How other data differ from the labelled pairs, by confidences and by texts.

    Compared are one pair of each conversation here, and one of each there.

    data: file of the other triplets; triplets: how many are compared.
    ks: Kolmogorov-Smirnov statistic, the largest difference of the two distribution functions.
    chance: what it stays below with probability 95 % if the distributions are the same.
    distance: first Wasserstein distance by deciles, `cwpo_annotator.confidence.drift`.
    certified: share of the other triplets with a confidence above the certificate's threshold.
    embeddings: None of an annotator without hidden states, or of too few triplets.
    """

    data: str
    triplets: int
    mean_confidence: float
    ks: float
    chance: float
    distance: float
    certified: float | None
    embeddings: EmbeddingShift | None = None


class Assessment(BaseModel):
    """Which of an annotator's labels can be trusted.

    unseen: whether it is known that the annotator was not trained or calibrated on the pairs.
    certificate: of max_error and delta; None if the labels allow none.
    labels_needed: about how many would allow one, of as many conversations; None if none would.
    sources: accuracy by the column `source`.
    verdict: what follows, in sentences.
    """

    max_error: float
    delta: float
    unseen: bool
    certificate: Certificate | None
    labels_needed: int | None
    length_bias: Bias | None
    position_bias: Bias | None
    sources: dict[str, Share]
    shift: Shift | None
    verdict: list[str]


class Estimate(BaseModel):
    """A mean over prompts with its 95 % interval."""

    value: float
    low: float
    high: float
    prompts: int


class Writing(BaseModel):
    """How a model writes, whatever a judge makes of it.

    tokens: mean length of its answers, in tokens of the reference.
    ended: share of answers that it ended itself, before --max-new-tokens.
    distinct: share of different ones among its answers.
    distinct_bigrams: share of different ones among the pairs of neighbouring words of an answer,
        mean over answers; low where answers repeat themselves.
    """

    tokens: float
    ended: float
    distinct: float
    distinct_bigrams: float


class Divergence(BaseModel):
    """Mean of log(policy / reference) over the policy's own answers, in nats.

    An unbiased estimate of the KL divergence from the reference if they are sampled at a
    temperature of 1.

    answer: over answers; token: over tokens.
    """

    answer: float
    token: float


class Comparison(BaseModel):
    """A policy against the baseline, prompt by prompt. Intervals are by paired bootstrap.

    baseline: name of the model.
    win_share: win share of the policy less that of the baseline, which is a half if the baseline is
        the reference.
    reward_gap: score of the policy's answer less that of the baseline's, over the prompts on which
        both have one.
    higher: share of the prompts on which the policy's answer scores higher; a tie is half, and an
        answer without a score is below any other.
    longer: share of prompts on which the policy's answer is longer.
    higher_if_longer, higher_if_not: `higher` over these prompts, and over the others.
    length_ratio: mean length of the policy's answers, divided by that of the baseline's.
    prompts_needed: about how many prompts would show a win share that differs as much; None if it
        does not differ, or as much on each prompt.
    """

    baseline: str
    win_share: Estimate
    reward_gap: Estimate | None
    higher: float
    longer: float
    higher_if_longer: float | None
    higher_if_not: float | None
    length_ratio: float | None
    prompts_needed: int | None


class PolicyMetrics(BaseModel):
    """Measures of one policy against the reference.

    What is None here was not measured by an earlier version, or is said below.

    preference_accuracy: share of held-out pairs whose chosen response has the higher implicit
        reward beta * log(policy / reference); a tie is half. None where DATA has no pairs.
    implicit_margin: mean difference of the two implicit rewards; None likewise.
    win_share: share of prompts on which its answer scores above the reference's; a tie is half. An
        answer that cannot be scored loses to any that can, and ties with another such. Judged by a
        gold reward model, it is the paper's gold reward accuracy (GRA).
    low, high: its 95 % interval.
    win_share_thirds: the same on three disjoint thirds of the prompts.
    win_share_deviation: standard deviation over these thirds, the paper's ±; None for one third.
    mean_score: mean score of its answers that could be scored; None if none could.
    scored: number of these answers.
    unscored: number of its other answers, for each reason.
    divergence: None where its tokens are not those of the reference.
    comparison: with the baseline; None for the baseline itself.
    """

    preference_accuracy: float | None
    implicit_margin: float | None
    win_share: float
    low: float | None = None
    high: float | None = None
    win_share_thirds: list[float]
    win_share_deviation: float | None = None
    mean_score: float | None
    scored: int
    unscored: dict[str, int]
    writing: Writing | None = None
    divergence: Divergence | None = None
    comparison: Comparison | None = None


class WinRate(BaseModel):
    """How often an LLM judge prefers a policy's answers to others, asked in both orders.

    rate: share of the prompts, a tie being half, with Wilson's interval.
    wins, ties, losses: their numbers; a tie is a prompt on which the orders disagree.
    unclear: number of replies that do not say which answer is better.
    difference: from the rate of the baseline, by paired bootstrap; None for the baseline itself,
        and where it is the reference.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int
    unclear: int
    difference: Estimate | None


class LlmJudgement(BaseModel):
    """What an LLM judge makes of all policies.

    model, url: who was asked; prompt: which of the two prompts.
    against: what the policies' answers were compared with: "chosen" responses, or those of the
        model of this name.
    questions: number of those that were asked; questions_kept: those whose reply was there already.
    prompt_tokens, completion_tokens: what all of them cost, as far as the endpoint says.
    """

    model: str
    url: str
    prompt: str
    against: str
    questions: int
    questions_kept: int
    prompt_tokens: int
    completion_tokens: int
    policies: dict[str, WinRate]
