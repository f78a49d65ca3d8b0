"""Reading the weighted dataset that `cwpo annotate` and batch jobs write."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cwpo.datasets import NumberedTriplet, file_format, parse_triplet, read_rows
from cwpo.errors import DatasetError
from cwpo.types import ModelRef, Prompt
from cwpo_trainer import weights
from cwpo_trainer.data import prompt_key, read_pairs
from cwpo_trainer.weights import Weighting


@dataclass(frozen=True, slots=True)
class WeightedPair:
    """A row of the weighted dataset; chosen is what the annotator prefers."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs with their weights in the loss, shape (pairs,)."""

    pairs: list[WeightedPair]
    weights: NDArray[np.float32]

    def only(self, rows: NDArray[np.bool_]) -> Preferences:
        """Those of the rows that are true, shape (pairs,)."""
        pairs = [self.pairs[at] for at in np.flatnonzero(rows)]
        return Preferences(pairs, self.weights[rows])


def read_weighted(path: Path, *, calibrated: bool = False) -> list[WeightedPair]:
    """All rows, in order.

    Args:
        path: Parquet, JSONL or JSONL.gz.
        calibrated: take `calibrated_confidence` rather than `confidence`.
    Raises: DatasetError naming the row of the first missing or unusable value.
    """
    column = "calibrated_confidence" if calibrated else "confidence"
    try:
        with path.open("rb") as stream:
            rows = read_rows(stream, file_format(path))
            pairs = [_pair(path, number, row, column) for number, row in rows]
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    if not pairs:
        raise DatasetError(f"{path}: holds no pairs")
    return pairs


def read_human(path: Path) -> list[WeightedPair]:
    """Human-labelled pairs, in order, each with confidence 1: the baseline C = 1.

    Raises: DatasetError naming the first bad row.
    """
    return [
        WeightedPair(pair.id, pair.prompt, pair.chosen, pair.rejected, 1.0)
        for pair in read_pairs(str(path))
    ]


def annotator_of(path: Path) -> ModelRef | None:
    """Which annotator wrote a weighted dataset; None where the file does not say (JSONL)."""
    if file_format(path) != "parquet":
        return None
    try:
        noted = (pq.read_schema(path).metadata or {}).get(b"cwpo.annotator")
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path}: not a readable Parquet file: {error}") from error
    return None if noted is None else ModelRef.model_validate_json(noted)


def evaluation_rows(
    pairs: Sequence[WeightedPair], fraction: float, *, seed: int
) -> NDArray[np.bool_]:
    """Which pairs to keep for evaluation, shape (pairs,): a share of the prompts, by their hash.

    A prompt falls on the same side in any dataset, so that SFT and alignment keep the same ones.
    Raises: DatasetError when no pair is left for either side.
    """
    kept = np.array([_share(pair.prompt, seed) < fraction for pair in pairs])
    if kept.all() or not kept.any():
        raise DatasetError(
            f"{len(pairs):,} pairs are too few to evaluate on {fraction:.0%} of their prompts: "
            "give --eval-data"
        )
    return kept


def _share(prompt: Prompt, seed: int) -> float:
    """Where the prompt stands in [0, 1), as good as at random."""
    digest = hashlib.sha256(f"{seed}:{prompt_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def weights_of(
    pairs: list[WeightedPair],
    weighting: Weighting,
    *,
    normalise: bool,
    top_percent: float = 100,
    exponent: float = 1,
) -> NDArray[np.float32]:
    """The weight of each pair in the loss, shape (pairs,).

    Raises: DatasetError if all are 0, or all pairs have the same confidence to weight them by.

    Args:
        top_percent: of `top`.
        exponent: of `power`.
    """
    if weighting == "none":
        return weights.none(len(pairs))
    confidences = weights.confidence([pair.confidence for pair in pairs])
    if len(pairs) > 1 and confidences.min() == confidences.max():
        raise DatasetError(
            f"all {len(pairs):,} pairs have the confidence {confidences[0]:g}, so it tells none "
            "from another: look at the annotator, or take --weight none"
        )
    match weighting:
        case "confidence":
            values = confidences
        case "top":
            values = weights.top(confidences, top_percent)
        case "margin":
            values = weights.margin(confidences)
        case "normalised_margin":
            values = weights.normalised_margin(confidences)
        case "power":
            values = weights.power(confidences, exponent)
        case "entropy":
            values = weights.entropy(confidences)
        case "rank":
            values = weights.rank(confidences)
    return weights.normalise(values) if normalise else values


def _pair(path: Path, number: int, row: dict[str, Any] | str, column: str) -> WeightedPair:
    parsed = parse_triplet(number, row)
    if not isinstance(parsed, NumberedTriplet):
        raise DatasetError(f"{path}: row {number}: {parsed.error.detail}")
    value = row.get(column) if isinstance(row, dict) else None
    if value is None:
        raise DatasetError(f"{path}: row {number}: {column} is missing{_hint(column)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DatasetError(f"{path}: row {number}: {column} is no number: {value!r}")
    if not 0 <= value <= 1:
        raise DatasetError(f"{path}: row {number}: {column} is {value}; it lies in [0, 1]")
    triplet = parsed.triplet
    if triplet.response_a == triplet.response_b:
        raise DatasetError(
            f"{path}: row {number}: both responses are the same, so there is nothing to prefer: "
            "leave such rows out"
        )
    return WeightedPair(
        str(triplet.id), triplet.prompt, triplet.response_a, triplet.response_b, float(value)
    )


def _hint(column: str) -> str:
    if column == "confidence":
        return "; `cwpo annotate` writes it"
    return "; the annotator that wrote this file has no calibration temperature"
