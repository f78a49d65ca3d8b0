"""What several people's answers come to, and how far they and the annotator agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from cwpo.reviews.pairs import ReviewAnswer
from cwpo.types import Preference, Prompt


class ReviewedPair(BaseModel):
    """A pair with the label that most of its reviewers gave it; its rows are labelled pairs."""

    id: str
    prompt: Prompt
    response_a: str
    response_b: str
    preferred: Preference
    reviewers: list[str]
    source: str = "review"


class Agreement(BaseModel):
    """A share of answers that are equal; None of none.

    compared: how many answers, or pairs of answers, were compared.
    """

    share: float | None
    compared: int

    @classmethod
    def of(cls, equal: Iterable[bool]) -> Agreement:
        """The share of what is true."""
        values = [*equal]
        return cls(share=sum(values) / len(values) if values else None, compared=len(values))


class ReviewReport(BaseModel):
    """What the answers came to.

    ties: pairs that most reviewers found equal. split: pairs without a most frequent answer.
    between_reviewers: of every two answers to the same pair.
    alpha: Krippendorff's, of the same: 1 for full agreement, 0 for that of chance; None where no
        pair has two answers, or all answers are equal.
    with_annotator: of the labelled pairs, unless the annotator found a tie.
    reviewers: agreement of each reviewer's own answers with the annotator.
    """

    answers: int
    labelled: int
    ties: int
    split: int
    between_reviewers: Agreement
    alpha: float | None
    with_annotator: Agreement
    reviewers: dict[str, Agreement]


def merged(answers: Sequence[ReviewAnswer]) -> tuple[list[ReviewedPair], ReviewReport]:
    """The labelled pairs of the answers, in the order of their first answers, and a report.

    The last answer of a reviewer to a pair counts. Ties and split votes are no labels.
    """
    of_pair: dict[Any, dict[str, ReviewAnswer]] = defaultdict(dict)
    for answer in answers:
        of_pair[answer.key][answer.reviewer] = answer
    labelled: list[ReviewedPair] = []
    annotated: list[tuple[Preference, Preference | None]] = []
    ties = split = 0
    for votes in of_pair.values():
        winner = _winner(votes.values())
        first = next(iter(votes.values()))
        if winner is None:
            split += 1
        elif winner == "tie":
            ties += 1
        else:
            annotated.append((winner, first.annotator))
            fields = first.model_dump(include={"id", "prompt", "response_a", "response_b"})
            labelled.append(ReviewedPair(**fields, preferred=winner, reviewers=sorted(votes)))
    counted = [answer for votes in of_pair.values() for answer in votes.values()]
    counts = [Counter(answer.preferred for answer in votes.values()) for votes in of_pair.values()]
    return labelled, ReviewReport(
        answers=len(counted),
        labelled=len(labelled),
        ties=ties,
        split=split,
        between_reviewers=_between(of_pair.values()),
        alpha=krippendorff_alpha(counts),
        with_annotator=_with(annotated),
        reviewers={
            name: _with([(a.preferred, a.annotator) for a in counted if a.reviewer == name])
            for name in sorted({answer.reviewer for answer in counted})
        },
    )


def krippendorff_alpha(counts: Iterable[Mapping[Preference, int]]) -> float | None:
    """Krippendorff's alpha of nominal answers, from the numbers of each answer to each pair.

    Pairs with one answer do not count. None where nothing is left, or all answers are equal.
    """
    units = [unit for unit in counts if sum(unit.values()) > 1]
    total: Counter[Preference] = Counter()
    observed = 0.0
    for unit in units:
        size = sum(unit.values())
        total.update(unit)
        observed += (size * size - sum(n * n for n in unit.values())) / (size - 1)
    size = sum(total.values())
    expected = size * size - sum(n * n for n in total.values())
    return 1 - (size - 1) * observed / expected if expected else None


def _winner(votes: Iterable[ReviewAnswer]) -> Preference | None:
    """The most frequent answer; None if there are two."""
    (first, *others) = Counter(vote.preferred for vote in votes).most_common()
    return None if others and others[0][1] == first[1] else first[0]


def _between(pairs: Iterable[Mapping[str, ReviewAnswer]]) -> Agreement:
    equal = []
    for votes in pairs:
        given = [vote.preferred for vote in votes.values()]
        equal += [given[i] == given[j] for i in range(len(given)) for j in range(i)]
    return Agreement.of(equal)


def _with(labels: Iterable[tuple[Preference, Preference | None]]) -> Agreement:
    """Agreement of answers with the annotator's labels, where neither is a tie."""
    return Agreement.of(
        own == annotator for own, annotator in labels if own != "tie" and annotator in ("a", "b")
    )
