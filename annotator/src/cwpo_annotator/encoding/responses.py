"""Encoders that mark where responses start, and the encoder of both responses in one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cwpo.errors import CwpoError
from cwpo.types import ItemError, Prompt, Truncation
from cwpo_annotator.checkpoint import IMPLICIT, Objective
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.joining import JoinedText
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_annotator.encoding.tokenisation import response_start


class PairwiseError(CwpoError):
    """An annotator that only compares two responses was asked to score a single one."""

    def __init__(self) -> None:
        super().__init__(
            "this annotator was trained with --objective pairrm: it compares two responses and "
            "has no score of one alone; annotate triplets, or use one of another objective"
        )


class ResponseEncoder(Encoder):
    """An Encoder whose pairs and texts have the position at which the responses start.

    If a token spans prompt and response, all responses to a prompt start at the earliest position.
    """

    def pair(
        self,
        texts: Sequence[JoinedText | ItemError],
        ids: Sequence[list[int]],
        truncation: Truncation,
    ) -> EncodedPair | ItemError:
        """A pair from the ids of its two texts, with a truncated prompt if they are too long."""
        pair = super().pair(texts, ids, truncation)
        if isinstance(pair, ItemError):
            return pair
        return replace(pair, start=self._start(texts) - (len(ids[0]) - len(pair.a)))

    def several(
        self,
        texts: Sequence[JoinedText | ItemError],
        ids: Sequence[list[int]],
        truncation: Truncation,
    ) -> list[EncodedText] | ItemError:
        """The texts of one prompt from their ids, with a truncated prompt if one is too long."""
        several = super().several(texts, ids, truncation)
        if isinstance(several, ItemError):
            return several
        start = self._start(texts) - (len(ids[0]) - len(several[0].ids))
        return [replace(text, start=start) for text in several]

    def _start(self, texts: Sequence[JoinedText | ItemError]) -> int:
        joined = [text for text in texts if isinstance(text, JoinedText)]
        return min(response_start(self.tokenizer, text) for text in joined)


class PairEncoder(ResponseEncoder):
    """Encodes the prompt and both responses as one text, in both orders: a before b, b before a.

    Each response ends with EOS. In the pair, `a` is the text with response a first, whose score is
    the logit of a being preferred, and `b` is the text with response b first.
    """

    compares_only = True

    def pair(
        self,
        texts: Sequence[JoinedText | ItemError],
        ids: Sequence[list[int]],
        truncation: Truncation,
    ) -> EncodedPair | ItemError:
        """Both orders of the two responses, with a truncated prompt if they are too long."""
        known = [text for text in texts if isinstance(text, JoinedText)]
        start = min(self._start(known), common_prefix(*ids)) if len(known) == len(texts) else 0
        fitted = self.fit(texts, ids, truncation, tokens=sum(map(len, ids)) - start)
        if isinstance(fitted, ItemError):
            return fitted
        (a, b), truncated = fitted
        start -= len(ids[0]) - len(a)
        forth, back = a + b[start:], b + a[start:]
        return EncodedPair(forth, back, truncated, start)

    def encode_responses(
        self,
        items: Sequence[tuple[Prompt, Sequence[str]]],
        truncation: Truncation = "error",
    ) -> list[list[EncodedText] | ItemError]:
        """Raises: PairwiseError, since a response has no score without another one."""
        raise PairwiseError


def encoder_of(objective: Objective | None) -> type[Encoder]:
    """The class of encoder with which annotators of this objective are trained and served."""
    if objective == "pairrm":
        return PairEncoder
    return ResponseEncoder if objective in IMPLICIT else Encoder
