"""What follows from an annotator's figures: whether to use it, for which labels, what to label."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from cwpo.certificates import described
from cwpo_trainer.evaluation.metrics import AnnotatorMetrics, Assessment, Bias

_HOLDS = "It holds for data exchangeable with these pairs, and says nothing of other data."


def verdict(metrics: AnnotatorMetrics, found: Assessment) -> list[str]:
    """Sentences that a person can act on; the first says whether the annotator is usable."""
    return [*_usable(metrics, found), *_to_label(metrics, found), *_warnings(metrics, found)]


def _usable(metrics: AnnotatorMetrics, found: Assessment) -> Iterator[str]:
    if found.certificate is not None:
        yield f"Usable: {described(found.certificate)}. {_HOLDS}"
        return
    if metrics.low is not None and metrics.low <= 0.5:
        yield (
            "Not usable: its labels cannot be told from guesses (accuracy "
            f"{metrics.accuracy:.1%}, 95 % interval {metrics.low:.1%} to {metrics.high:.1%})."
        )
    else:
        best = max(metrics.coverage, key=lambda point: point.accuracy.low)
        yield (
            f"Not usable where at most {_percent(found.max_error)} of labels may be wrong: above "
            "no confidence is that known with a probability of "
            f"{_percent(1 - found.delta)}. Surest are its most confident {best.coverage:.0%}, with "
            f"an accuracy of {best.accuracy}."
        )


def _to_label(metrics: AnnotatorMetrics, found: Assessment) -> Iterator[str]:
    if found.certificate is None:
        if found.labels_needed is not None and found.labels_needed > (metrics.conversations or 0):
            yield (
                f"Label more pairs to measure it on: with about {found.labels_needed:,}, each of "
                f"another conversation (now {metrics.conversations:,}), a certificate can be "
                "expected if the share of errors stays the same."
            )
        elif found.labels_needed is None:
            yield (
                "More labels to measure it on would not help, since at every confidence too many "
                "are wrong: label more to train on, or allow a larger --max-error."
            )
        else:
            yield (
                "Down to a lower confidence few enough are wrong, but not among its surest labels, "
                "where the test begins: look at the surest of the wrong ones."
            )
    guesses = [*takewhile(lambda item: item.low is not None and item.low <= 0.5, metrics.bins)]
    if guesses:
        count = sum(item.pairs for item in guesses)
        right = sum(item.pairs * item.accuracy for item in guesses) / count
        yield (
            f"Label next, to train on: pairs with a confidence up to {guesses[-1].highest:.4g}. "
            f"There are {count:,} of them here, in tenths that cannot be told from guesses "
            f"({right:.1%} right)."
        )


def _warnings(metrics: AnnotatorMetrics, found: Assessment) -> Iterator[str]:
    for name, share in found.sources.items():
        if metrics.low is not None and share.high < metrics.low:
            yield f"It is less accurate on pairs of the source {name!r}: {share}."
    for name, bias in (("longer", found.length_bias), ("first", found.position_bias)):
        if bias is not None and _differ(bias):
            yield (
                f"It prefers the {name} response in {bias.annotator}, people do in {bias.people}."
            )
    shift = found.shift
    if shift is not None and shift.ks > shift.chance:
        yield (
            f"The confidences on {shift.data} are distributed otherwise (Kolmogorov-Smirnov "
            f"{shift.ks:.3f}, by chance up to {shift.chance:.3f}): what is measured here, and any "
            "certificate, does not hold for it. Label some of its pairs, and measure on those."
        )
    if shift is not None and (texts := shift.embeddings) and texts.auc > texts.chance:
        yield (
            f"The texts of {shift.data} are others: embeddings tell them from these pairs (AUC "
            f"{texts.auc:.2f}, by chance up to {texts.chance:.2f}). A certificate is for data "
            "exchangeable with these pairs, which they are not."
        )
    if not found.unseen:
        yield (
            "The annotator does not tell which labels it was trained on. If these are among them, "
            "none of this holds."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _differ(bias: Bias) -> bool:
    ours, theirs = bias.annotator, bias.people
    return ours.low > theirs.high or theirs.low > ours.high
