"""The measures of evaluations, as they are written to run.json."""

from __future__ import annotations

from pydantic import BaseModel


class ConfidenceBin(BaseModel):
    """A tenth of the pairs, sorted by confidence, and how often their labels are right."""

    pairs: int
    lowest: float
    highest: float
    mean_confidence: float
    accuracy: float


class AnnotatorMetrics(BaseModel):
    """Agreement with human labels.

    accuracy: share of pairs on which the annotator prefers the chosen response; a tie is half.
    ece: expected calibration error of P(chosen is better) = (1 + confidence) / 2 over the bins.
    calibrated_ece: the same with the calibrated confidence, if the annotator has a temperature.
    confidence_quantiles: at 0, 0.1, ..., 1.
    failed: number of pairs that could not be scored; they are in none of the other figures.
    """

    pairs: int
    failed: int
    accuracy: float
    mean_confidence: float
    ece: float
    calibrated_ece: float | None = None
    confidence_quantiles: list[float]
    bins: list[ConfidenceBin]

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


class PolicyMetrics(BaseModel):
    """Measures of one policy against the reference.

    preference_accuracy: share of held-out pairs whose chosen response has the higher implicit
        reward beta * log(policy / reference); a tie is half.
    implicit_margin: mean difference of the two implicit rewards.
    win_share: share of prompts on which its answer scores above the reference's; a tie is half. An
        answer that cannot be scored loses to any that can, and ties with another such.
    win_share_thirds: the same on three disjoint thirds of the prompts.
    mean_score: mean annotator score of its answers that could be scored; None if none could.
    scored: number of these answers.
    unscored: number of its other answers, for each reason.
    """

    preference_accuracy: float
    implicit_margin: float
    win_share: float
    win_share_thirds: list[float]
    mean_score: float | None
    scored: int
    unscored: dict[str, int]
