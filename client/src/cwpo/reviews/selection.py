"""The uncertain rows of a dataset that are worth a person's time: few, and not all of one kind."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from cwpo.reviews.pairs import ReviewPair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    # Of rows, each of the same width; None for a row without one.
    Embeddings = Sequence[ArrayLike | None]

_POOL = 10
# Pairs to embed: half a minute of a small annotator on two CPU cores.
_MOST_POOLED = 2000


def pool_size(most: int) -> int:
    """How many uncertain rows a selection of `most` is made from."""
    return max(most, min(_POOL * most, _MOST_POOLED))


def sampled(pairs: Iterable[ReviewPair], size: int) -> list[ReviewPair]:
    """Up to `size` of the pairs, in their order; which ones is decided by hashes of their texts."""
    numbered = enumerate(pairs)
    kept = heapq.nsmallest(
        size, ((_hashed(pair), number, pair) for number, pair in numbered), key=_hash_first
    )
    return [pair for _, _, pair in sorted(kept, key=lambda item: item[1])]


def spread(pairs: Sequence[ReviewPair], embeddings: Embeddings, most: int) -> list[ReviewPair]:
    """Up to `most` pairs that are unlike each other, the most unlike ones first.

    Farthest-first traversal: it begins with the least confident pair, and goes on with the one
    that is least similar to all that were taken. Similarity is the cosine of the angle between
    embeddings, from their mean. The first n of the result are spread too.

    Args:
        embeddings: of the pairs, of equal width; those without one come last, the least confident
            of them first.
    """
    import numpy as np

    by_confidence = sorted(range(len(pairs)), key=lambda at: pairs[at].confidence or 0.0)
    known = [at for at in by_confidence if embeddings[at] is not None]
    unknown = [at for at in by_confidence if embeddings[at] is None]
    order: list[int] = []
    if known:
        vectors = np.array([embeddings[at] for at in known], np.float32)
        vectors -= vectors.mean(axis=0)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        # The highest similarity to any pair that was taken; of equal ones, argmin is the first.
        nearest = np.full(len(known), -2.0, np.float32)
        for _ in range(min(most, len(known))):
            chosen = int(nearest.argmin())
            order.append(known[chosen])
            nearest = np.maximum(nearest, vectors @ vectors[chosen])
            nearest[chosen] = np.inf
    return [pairs[at] for at in [*order, *unknown][:most]]


def _hash_first(item: tuple[bytes, int, ReviewPair]) -> tuple[bytes, int]:
    return item[:2]


def _hashed(pair: ReviewPair) -> bytes:
    # Not a checksum, whose first bits are alike for names that are alike.
    text = f"{pair.id}\n{pair.response_a}"
    return blake2b(text.encode(errors="replace"), digest_size=8).digest()
