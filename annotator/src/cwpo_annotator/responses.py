"""Encoders that know where the responses start, and the one that joins both into one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cwpo.errors import CwpoError
from cwpo.types import ItemError, ScoreItem, Truncation
from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.checkpoint import IMPLICIT, Objective
from cwpo_annotator.encoding import Encoder, Text, common_prefix


class PairwiseError(CwpoError):
    """A single response was to be scored by an annotator that only compares two."""


class ResponseEncoder(Encoder):
    """An Encoder whose pairs and texts say at which token the responses start.

    Where tokens merge across the seam, both responses of a pair start at the earlier place.
    """

    def pair(
        self, texts: Sequence[Text | ItemError], ids: Sequence[list[int]], truncation: Truncation
    ) -> EncodedPair | ItemError:
        """A pair of the ids of its two texts, cut where they are too long."""
        pair = super().pair(texts, ids, truncation)
        if isinstance(pair, ItemError):
            return pair
        return replace(pair, start=self._start(texts) - (len(ids[0]) - len(pair.a)))

    def single(
        self, text: Text | ItemError, ids: list[int], truncation: Truncation
    ) -> EncodedText | ItemError:
        """A text of its ids, cut where they are too long."""
        single = super().single(text, ids, truncation)
        if isinstance(single, ItemError):
            return single
        return replace(single, start=self._start([text]) - (len(ids) - len(single.ids)))

    def _start(self, texts: Sequence[Text | ItemError]) -> int:
        return min(self.response_start(text) for text in texts if isinstance(text, Text))


class PairEncoder(ResponseEncoder):
    """Reads both responses after their prompt in one text: a before b, and b before a.

    Each response ends with EOS. The pair's `a` is the text that begins with response a, and its
    score the logit of a being preferred; its `b` begins with response b.
    """

    def pair(
        self, texts: Sequence[Text | ItemError], ids: Sequence[list[int]], truncation: Truncation
    ) -> EncodedPair | ItemError:
        """Both orders of the two responses, cut where they are too long together."""
        known = [text for text in texts if isinstance(text, Text)]
        start = min(self._start(known), common_prefix(*ids)) if len(known) == len(texts) else 0
        fitted = self.fit(texts, ids, truncation, tokens=sum(map(len, ids)) - start)
        if isinstance(fitted, ItemError):
            return fitted
        (a, b), truncated = fitted
        start -= len(ids[0]) - len(a)
        forth, back = a + b[start:], b + a[start:]
        return EncodedPair(forth, back, common_prefix(forth, back), truncated, start)

    def encode_texts(
        self, items: Sequence[ScoreItem], truncation: Truncation = "error"
    ) -> list[EncodedText | ItemError]:
        """Raises: PairwiseError; there is no score of one response."""
        raise PairwiseError(
            "this annotator was trained with --objective pairrm: it compares two responses and "
            "has no score of one alone; annotate triplets, or use one of another objective"
        )


def encoder_of(objective: Objective | None) -> type[Encoder]:
    """The encoder that annotators of this objective are trained and served with."""
    if objective == "pairrm":
        return PairEncoder
    return ResponseEncoder if objective in IMPLICIT else Encoder
