"""The gate before int8: its labels on a calibration sample have to be those of float32."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cwpo.datasets import NumberedTriplet, file_format, read_triplets
from cwpo.errors import CwpoError, DatasetError
from cwpo.types import Triplet
from cwpo_annotator import checkpoint
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.torch import TorchBackend
from cwpo_annotator.checkpoint import Card, Int8Check
from cwpo_annotator.encoding import Encoder

FEWEST_PAIRS = 100


class QuantizationError(CwpoError):
    """int8 would label otherwise than float32 does, or that cannot be found out."""


def quantize(annotator: str | Path, calibration: Path, output: Path, pairs: int) -> Int8Check:
    """Copy an annotator to `output`, allowed to be loaded in int8, if its labels stay the same.

    Args:
        calibration: triplets like those to be annotated, labels are not needed.
        pairs: of the calibration sample that are compared, at most.
    Raises: QuantizationError below the agreement that is asked for, and then nothing is written.
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
    triplets = _sample(calibration, pairs)
    encoded = loaded.encode(triplets)
    kept = [item for item in encoded if isinstance(item, EncodedPair)]
    if len(kept) < FEWEST_PAIRS:
        raise QuantizationError(
            f"--calibration {calibration}: {len(kept)} pairs can be annotated, and at least "
            f"{FEWEST_PAIRS} are needed"
        )
    rounded = TorchBackend(folder, pad_token_id=encoder.pad_token_id, dtype="int8", device="cpu")
    same = _labels(loaded.score_pairs(kept)) == _labels(rounded.score_pairs(kept))
    check = Int8Check(
        agreement=float(same.mean()), pairs=len(kept), sample_sha256=_fingerprint(triplets)
    )
    if check.agreement < checkpoint.INT8_AGREEMENT:
        raise QuantizationError(
            f"{annotator}: int8 gives the label of float32 to {check.agreement:.2%} of "
            f"{check.pairs:,} pairs, and {checkpoint.INT8_AGREEMENT:.0%} are asked for; use "
            "bfloat16 for this annotator"
        )
    shutil.copytree(folder, output)
    checkpoint.write_card(output, card.model_copy(update={"int8": check}))
    return check


def _sample(path: Path, pairs: int) -> list[Triplet]:
    try:
        with path.open("rb") as stream:
            rows = read_triplets(stream, file_format(path))
            good = (row.triplet for row in rows if isinstance(row, NumberedTriplet))
            return list(islice(good, pairs))
    except OSError as error:
        raise DatasetError(f"--calibration {path}: {error.strerror}") from error


def _labels(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    margins: NDArray[np.float32] = scores[:, 0] - scores[:, 1]
    return np.sign(margins)


def _fingerprint(triplets: Sequence[Triplet]) -> str:
    digest = hashlib.sha256()
    for triplet in triplets:
        digest.update(triplet.model_dump_json(exclude={"id"}).encode() + b"\n")
    return digest.hexdigest()
