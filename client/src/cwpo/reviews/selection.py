"""The uncertain rows of a dataset that are worth a person's time: few, and not all of one kind."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise
from zlib import crc32

from cwpo.reviews.pairs import ReviewPair

# Comparisons of two prompts that a selection may take: a few seconds.
_COMPARISONS = 5_000_000
_POOL = 10
_BITS = 2048
_WORDS = 400
_WORD = re.compile(r"\w+")


def pool_size(most: int) -> int:
    """How many uncertain rows a selection of `most` is made from."""
    return min(_POOL * most, max(most, _COMPARISONS // most))


def sampled(pairs: Iterable[ReviewPair], size: int) -> list[ReviewPair]:
    """Up to `size` of the pairs, in their order; which ones is decided by hashes of their texts."""
    numbered = enumerate(pairs)
    kept = heapq.nsmallest(
        size, ((_hashed(pair), number, pair) for number, pair in numbered), key=_hash_first
    )
    return [pair for _, _, pair in sorted(kept, key=lambda item: item[1])]


def spread(pairs: Sequence[ReviewPair], most: int) -> list[ReviewPair]:
    """Up to `most` pairs whose prompts are unlike each other, the most unlike ones first.

    Farthest-first traversal: it begins with the least confident pair, and goes on with the one
    whose prompt is least similar to all that were taken. Similarity is that of Jaccard, of sets of
    words and word pairs, which are hashed into 2,048 bits; of prompts that are alike, the less
    confident pair is taken. The first n of the result are spread too.
    """
    marks = [_mark(pair.prompt_text) for pair in pairs]
    sizes = [mark.bit_count() for mark in marks]
    # The highest similarity to any pair that was taken.
    nearest = [0.0] * len(pairs)
    # By confidence, so that the first of those that are equally unlike is the least confident.
    left = sorted(range(len(pairs)), key=lambda at: pairs[at].confidence or 0.0)
    taken: list[ReviewPair] = []
    while left and len(taken) < most:
        chosen = min(left, key=nearest.__getitem__)
        left.remove(chosen)
        taken.append(pairs[chosen])
        mark, size = marks[chosen], sizes[chosen]
        for at in left:
            both = (marks[at] & mark).bit_count()
            similarity = both / (sizes[at] + size - both)
            nearest[at] = max(nearest[at], similarity)
    return taken


def _hash_first(item: tuple[bytes, int, ReviewPair]) -> tuple[bytes, int]:
    return item[:2]


def _hashed(pair: ReviewPair) -> bytes:
    # Not a checksum, whose first bits are alike for names that are alike.
    text = f"{pair.id}\n{pair.response_a}"
    return blake2b(text.encode(errors="replace"), digest_size=8).digest()


def _mark(text: str) -> int:
    """The words and word pairs of a text as a set of bits."""
    words = _WORD.findall(text.lower())[:_WORDS]
    # The first bit stands for every text, so that none is empty.
    bits = 1
    for gram in [*words, *map(" ".join, pairwise(words))]:
        bits |= 2 << crc32(gram.encode(errors="replace")) % _BITS
    return bits
