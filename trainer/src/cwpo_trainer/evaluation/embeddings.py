"""How the texts of two files differ, in the hidden states of an annotator (cf. Fig. 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.evaluation.metrics import EmbeddingShift

# Of each file: enough to tell an AUC of 0.56 from chance, and half a minute on a CPU.
_MOST = 250
# Of each file: fewer halves could not tell an AUC of 0.75 from chance.
_FEWEST = 20
_SEED = 0
# The normal distribution's quantile at 95 %.
_NORMAL = 1.645


def embeddings_of(
    annotator: Annotator, triplets: Sequence[Triplet]
) -> list[NDArray[np.float32] | None]:
    """The embedding of each triplet, shape (width,); None for one that it cannot read.

    Raises: NoEmbeddingsError.
    """
    encoded = annotator.encode(triplets, "prompt_left")
    places = [at for at, item in enumerate(encoded) if isinstance(item, EncodedPair)]
    found = annotator.embed_pairs([item for item in encoded if isinstance(item, EncodedPair)])
    embeddings: list[NDArray[np.float32] | None] = [None] * len(triplets)
    for at, values, too_large in zip(places, found.values, found.too_large, strict=True):
        embeddings[at] = None if too_large else values
    return embeddings


def embedded(annotator: Annotator, triplets: Sequence[Triplet]) -> NDArray[np.float32] | None:
    """The embeddings of the triplets, of some if there are many.

    Returns: shape (n, width); None if the annotator has no embeddings here.
    """
    if not annotator.embeds:
        return None
    order = np.random.default_rng(_SEED).permutation(len(triplets))
    found = embeddings_of(annotator, [triplets[at] for at in order[:_MOST]])
    known = [embedding for embedding in found if embedding is not None]
    return np.stack(known) if known else None


def embedding_shift(
    here: NDArray[np.floating] | None, there: NDArray[np.floating] | None
) -> EmbeddingShift | None:
    """How well a linear discriminant tells two samples apart: a classifier two-sample test.

    Fitted to one half of each sample, it orders the other halves, whose AUC is that of the
    Mann-Whitney test (Lopez-Paz and Oquab, 2017, arXiv 1610.06545).

    Args:
        here, there: independent embeddings, shape (n, width) and (m, width).
    Returns: None without embeddings, or for too few to tell anything.
    """
    if here is None or there is None or min(len(here), len(there)) < _FEWEST:
        return None
    towards = discriminant(here[::2], there[::2])
    ours, theirs = here[1::2] @ towards, there[1::2] @ towards
    above: NDArray[np.float64] = np.sign(theirs[:, None] - ours) / 2 + 0.5
    deviation = math.sqrt((len(ours) + len(theirs) + 1) / (12 * above.size))
    plane = _principal(np.concatenate([here, there]))
    return EmbeddingShift(
        auc=float(above.mean()),
        chance=0.5 + _NORMAL * deviation,
        triplets=(len(here), len(there)),
        here=_points(plane[: len(here)]),
        there=_points(plane[len(here) :]),
    )


def discriminant(here: NDArray[np.floating], there: NDArray[np.floating]) -> NDArray[np.float64]:
    """Fisher's discriminant from here to there, shape (width,).

    The covariance within the samples is shrunk half-way to a multiple of the identity, since there
    may be more dimensions than samples.
    """
    middles = [sample.mean(axis=0, dtype=np.float64) for sample in (here, there)]
    within = np.concatenate(
        [sample - middle for sample, middle in zip((here, there), middles, strict=True)]
    )
    covariance = within.T @ within / len(within)
    width = len(covariance)
    shrunk = (covariance + np.eye(width) * (covariance.trace() / width + 1e-12)) / 2
    towards: NDArray[np.float64] = np.linalg.solve(shrunk, middles[1] - middles[0])
    return towards


def _principal(samples: NDArray[np.floating]) -> NDArray[np.float64]:
    """The samples on their first two principal components, shape (n, 2), with deviation 1."""
    centred = samples - samples.mean(axis=0, dtype=np.float64)
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    plane: NDArray[np.float64] = left[:, :2] * math.sqrt(len(samples))
    return plane


def _points(plane: NDArray[np.float64]) -> list[tuple[float, float]]:
    return [(round(x, 3), round(y, 3)) for x, y in plane.tolist()]
