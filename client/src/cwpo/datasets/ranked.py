"""The pairs of a ranking, and the label of each."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from cwpo.types import Annotation, Pairs, Preference, Ranking, RankItem, Triplet


@dataclass(frozen=True, slots=True)
class RankedPair:
    """Two responses of an item, compared as those of a triplet.

    a, b: their places in the item's responses, a before b.
    label: its id is that of the item, "#", and the places of the chosen and the rejected response,
        such as "row-1#4-0".
    """

    a: int
    b: int
    label: Annotation

    def triplet(self, item: RankItem) -> Triplet:
        """The two responses of the item, under the id of the pair."""
        return Triplet(
            id=self.label.id,
            prompt=item.prompt,
            response_a=item.responses[self.a],
            response_b=item.responses[self.b],
        )


@dataclass(frozen=True, slots=True)
class RankedPairs:
    """The pairs of one item, in the order that `places` has."""

    id: str
    pairs: list[RankedPair]

    @classmethod
    def of(cls, ranking: Ranking, pairs: Pairs, temperature: float | None) -> RankedPairs:
        """The pairs that a ranking gives.

        Args:
            temperature: the checkpoint's, for calibrated_confidence; None if it has none.
        """
        chosen_and_rejected = places(ranking.order, pairs)
        return cls(ranking.id, [_pair(ranking, *each, temperature) for each in chosen_and_rejected])


def places(order: Sequence[int], pairs: Pairs) -> Iterator[tuple[int, int]]:
    """The places of the chosen and the rejected response of each pair, best ones first.

    Args:
        order: the places of the responses, best first.
        pairs: best_worst gives one pair, adjacent K - 1, all K (K - 1) / 2 of K responses.
    """
    if pairs == "best_worst":
        return iter([(order[0], order[-1])])
    return pairwise(order) if pairs == "adjacent" else combinations(order, 2)


def count_pairs(responses: int, pairs: Pairs) -> int:
    """How many pairs a ranking of so many responses gives."""
    if pairs == "best_worst":
        return 1
    return responses - 1 if pairs == "adjacent" else responses * (responses - 1) // 2


def _pair(ranking: Ranking, chosen: int, rejected: int, temperature: float | None) -> RankedPair:
    margin = ranking.scores[chosen] - ranking.scores[rejected]
    a, b = sorted((chosen, rejected))
    preferred: Preference = "tie" if margin == 0 else "a" if chosen == a else "b"
    label = Annotation(
        id=f"{ranking.id}#{chosen}-{rejected}",
        preferred=preferred,
        confidence=_confidence(margin),
        score_a=ranking.scores[a],
        score_b=ranking.scores[b],
        truncated=ranking.truncated,
        calibrated_confidence=None if temperature is None else _confidence(margin, temperature),
    )
    return RankedPair(a, b, label)


def _confidence(margin: float, temperature: float = 1.0) -> float:
    """Eq. 8, tanh(margin / 2T), in float32 as the annotator has it."""
    rounded: float = struct.unpack("f", struct.pack("f", math.tanh(margin / (2 * temperature))))[0]
    return rounded
