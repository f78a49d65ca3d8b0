"""The check before int8 is allowed: on a sample, its labels must be those of float32."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cwpo.datasets.triplets import RejectedRow, file_format, read_triplets
from cwpo.errors import CwpoError, DatasetError
from cwpo.progress import Progress
from cwpo.types import ItemError, Triplet
from cwpo_annotator import checkpoint
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.base import Backend
from cwpo_annotator.backends.torch.scalar import ScalarHeadBackend
from cwpo_annotator.checkpoint import Card, Int8Check
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.scores import Scores

FEWEST_PAIRS = 100
# Between two signs of progress: a few forward passes.
_COMPARED_PAIRS = 64


class QuantizationError(CwpoError):
    """int8 gives different labels than float32, or the two cannot be compared."""


def quantize(annotator: str | Path, calibration: Path, output: Path, pairs: int) -> Int8Check:
    """Write a copy of an annotator that can be loaded in int8, if its labels stay the same.

    Args:
        calibration: triplets like those to be annotated; labels are not needed.
        pairs: maximum number of triplets of the calibration file to compare.
    Raises: QuantizationError if fewer labels agree than INT8_AGREEMENT; then nothing is written.
    """
    if output.exists():
        raise QuantizationError(f"--output {output}: exists already; name a folder to create")
    folder = checkpoint.resolve(annotator)
    loaded = Annotator.load(folder, dtype="float32", device="cpu")
    encoder = Encoder.load(folder)
    card = checkpoint.read_card(folder) or Card(encoding=encoder.spec)
    if card.objective not in (None, "bt"):
        raise QuantizationError(
            f"{annotator}: int8 is for annotators of the objective bt, not {card.objective}"
        )
    triplets, problems = _sample(calibration, pairs)
    encoded = loaded.encode(triplets)
    kept = [item for item in encoded if isinstance(item, EncodedPair)]
    if len(kept) < FEWEST_PAIRS:
        problems += [item for item in encoded if isinstance(item, ItemError)]
        why = f"; the first that cannot: {problems[0].detail}" if problems else ""
        raise QuantizationError(
            f"--calibration {calibration}: only {len(kept)} of its triplets can be annotated, and "
            f"the comparison needs at least {FEWEST_PAIRS}{why}"
        )
    rounded = ScalarHeadBackend(
        folder, pad_token_id=encoder.pad_token_id, dtype="int8", device="cpu"
    )
    with Progress("compare", unit="triplets", total=len(kept)) as progress:
        same = np.concatenate(list(_agreement(loaded, rounded, kept, progress)))
    check = Int8Check(
        agreement=float(same.mean()), pairs=len(kept), sample_sha256=_fingerprint(triplets)
    )
    if check.agreement < checkpoint.INT8_AGREEMENT:
        raise QuantizationError(
            f"{annotator}: int8 and float32 give the same label to only {check.agreement:.2%} of "
            f"{check.pairs:,} triplets, and at least {checkpoint.INT8_AGREEMENT:.0%} are needed; "
            "use --dtype bfloat16 for this annotator"
        )
    shutil.copytree(folder, output)
    # Confidences in int8 differ a little, and certificates are of these.
    checkpoint.write_card(output, card.model_copy(update={"int8": check, "certificates": None}))
    return check


def _sample(path: Path, pairs: int) -> tuple[list[Triplet], list[ItemError]]:
    """The first triplets of the file, and what is wrong with rows among them."""
    triplets: list[Triplet] = []
    problems: list[ItemError] = []
    try:
        with path.open("rb") as stream:
            for row in read_triplets(stream, file_format(path)):
                if isinstance(row, RejectedRow):
                    problems.append(row.error)
                    continue
                triplets.append(row.triplet)
                if len(triplets) == pairs:
                    break
        return triplets, problems
    except OSError as error:
        raise DatasetError(f"--calibration {path}: {error.strerror}") from error


def _agreement(
    loaded: Annotator, rounded: Backend, pairs: Sequence[EncodedPair], progress: Progress
) -> Iterator[NDArray[np.bool_]]:
    """Which pairs get the same label from both, some pairs at a time."""
    for at in range(0, len(pairs), _COMPARED_PAIRS):
        compared = pairs[at : at + _COMPARED_PAIRS]
        yield _labels(loaded.score_pairs(compared)) == _labels(rounded.score_pairs(compared))
        progress.advance(len(compared))


def _labels(scores: Scores) -> NDArray[np.float32]:
    margins: NDArray[np.float32] = scores.values[:, 0] - scores.values[:, 1]
    return np.sign(margins)


def _fingerprint(triplets: Sequence[Triplet]) -> str:
    digest = hashlib.sha256()
    for triplet in triplets:
        digest.update(triplet.model_dump_json(exclude={"id"}).encode() + b"\n")
    return digest.hexdigest()
