"""Reading the weighted dataset that `cwpo annotate` and batch jobs write."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue

from cwpo.datasets.folder import dataset_files
from cwpo.datasets.triplets import file_format
from cwpo.datasets.weighted import annotator_of
from cwpo.errors import DatasetError
from cwpo.types import ModelRef, Prompt
from cwpo_trainer import weights
from cwpo_trainer.data.conversations import beginnings
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.data.rows import file_rows, is_tie, triplet_in
from cwpo_trainer.data.unused_rows import BadRowError, Row, UnusedRows
from cwpo_trainer.run.folder import RunFolder
from cwpo_trainer.weights import WEIGHTS


@dataclass(frozen=True, slots=True)
class WeightedPair:
    """A row of the weighted dataset; chosen is what the annotator prefers.

    prompt_pairs: number of pairs of the same prompt; None in a dataset of triplets.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    confidence: float
    prompt_pairs: int | None = None


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs with their weights in the loss, shape (pairs,).

    unused: the other rows of their file. epsilons: the probability of each pair that its label is
    wrong, same shape, for a loss that reads it.
    """

    pairs: list[WeightedPair]
    weights: NDArray[np.float32]
    unused: UnusedRows = field(default_factory=UnusedRows)
    epsilons: NDArray[np.float32] | None = None

    @property
    def has_prompt_pairs(self) -> bool:
        """Whether the dataset says how many pairs are of the same prompt."""
        return any(pair.prompt_pairs is not None for pair in self.pairs)

    def selected(self) -> Preferences:
        """The pairs of a weight above 0. Raises: DatasetError for none."""
        rows = self.weights > 0
        if not rows.any():
            raise DatasetError(
                f"none of {len(self.pairs):,} pairs is selected: raise --top-percent, or give more "
                "to --eval-data"
            )
        return self.only(rows)

    def only(self, rows: NDArray[np.bool_]) -> Preferences:
        """The pairs at which `rows`, shape (pairs,), is true."""
        pairs = [self.pairs[at] for at in np.flatnonzero(rows)]
        epsilons = None if self.epsilons is None else self.epsilons[rows]
        return Preferences(pairs, self.weights[rows], self.unused, epsilons)


def read_weighted(
    path: Path, unused: UnusedRows | None = None, *, calibrated: bool = False
) -> list[WeightedPair]:
    """The pairs of a weighted dataset, in order, without bad rows and ties.

    Args:
        path: Parquet, JSONL or JSONL.gz, or a folder of parts.
        unused: takes the rows that are left out; without it, a bad row is an error.
        calibrated: take `calibrated_confidence` rather than `confidence`.
    Raises: DatasetError for a file that cannot be read, or naming the first of too many bad rows.
    """
    column = "calibrated_confidence" if calibrated else "confidence"
    pairs = (unused or UnusedRows()).used(file_rows(path), path, partial(_pair, column=column))
    if not pairs:
        raise DatasetError(f"{path}: holds no pairs")
    with_counts = sum(pair.prompt_pairs is not None for pair in pairs)
    if with_counts not in (0, len(pairs)):
        raise DatasetError(
            f"{path}: {with_counts:,} of {len(pairs):,} rows have prompt_pairs: give the others "
            "the column too, 1 for a triplet"
        )
    return pairs


def read_human(path: Path, unused: UnusedRows) -> list[WeightedPair]:
    """Human-labelled pairs, in order, each with confidence 1: the baseline C = 1.

    Args:
        unused: takes the rows that are left out.
    Raises: DatasetError as `read_pairs` does.
    """
    return [
        WeightedPair(pair.id, pair.prompt, pair.chosen, pair.rejected, 1.0)
        for pair in read_pairs(str(path), unused)
    ]


def read_annotator(path: Path) -> ModelRef | None:
    """The annotator that wrote a weighted dataset; None where the file does not say (JSONL)."""
    # All parts of a folder are of one annotator.
    file = dataset_files(path)[0]
    if file_format(file) != "parquet":
        return None
    try:
        return annotator_of(pq.read_schema(file))
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{file}: not a readable Parquet file: {error}") from error


def annotator_results(path: Path, labels: str) -> dict[str, JsonValue]:
    """For run.json: name and revision of the annotator that labelled the pairs, where known.

    Args:
        labels: what --labels says; people have no revision.
    """
    annotator = read_annotator(path) if labels == "annotator" else None
    return {} if annotator is None else {"annotator": annotator.model_dump()}


def evaluation_rows(
    pairs: Sequence[WeightedPair], fraction: float, *, seed: int
) -> NDArray[np.bool_]:
    """Which pairs to keep for evaluation, shape (pairs,): a share of the conversations, by hash.

    SFT and alignment keep the same ones of a dataset, since all of its prompts count. Two datasets
    keep the same ones as far as they have the beginnings of their conversations in common.
    Raises: DatasetError when no pair is left for either side.
    """
    conversations = beginnings([pair.prompt for pair in pairs])
    kept = np.array([_share(beginning, seed) < fraction for beginning in conversations])
    if kept.all() or not kept.any():
        raise DatasetError(
            f"{len(pairs):,} pairs are too few to evaluate on {fraction:.0%} of them: "
            "give --eval-data"
        )
    return kept


def read_with_evaluation(
    read: Callable[[Path], Preferences],
    data: Path,
    *,
    eval_data: Path | None,
    eval_fraction: float,
    seed: int,
) -> tuple[Preferences, Preferences | None]:
    """The pairs to train on, and those to evaluate on, if any: of their own file, or a share.

    Raises: DatasetError.
    """
    preferences = read(data)
    if eval_data is not None:
        return preferences, read(eval_data)
    if not eval_fraction:
        return preferences, None
    kept = evaluation_rows(preferences.pairs, eval_fraction, seed=seed)
    return preferences.only(~kept), preferences.only(kept)


def report_unused(
    output: RunFolder, preferences: Preferences, evaluation: Preferences | None
) -> None:
    """Report the rows that were left out of each file that was read."""
    preferences.unused.report(output)
    if evaluation is not None and evaluation.unused is not preferences.unused:
        evaluation.unused.report(output, "eval")


def _share(beginning: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone, spread evenly over texts."""
    digest = hashlib.sha256(f"{seed}:{beginning}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def weights_of(
    pairs: list[WeightedPair],
    name: str,
    *,
    normalise: bool,
    by_prompt: bool = False,
    **constants: float,
) -> NDArray[np.float32]:
    """The weight of each pair in the loss, shape (pairs,).

    Args:
        name: of WEIGHTS.
        by_prompt: divide by the number of pairs of the same prompt, where the dataset has it.
        normalise: divide by the mean, unless the weight only selects pairs.
        constants: arguments of the weight's function.
    Raises: DatasetError if all are 0, or all pairs have the same confidence to weight them by.
    """
    weight = WEIGHTS[name]
    confidences = np.array([pair.confidence for pair in pairs], dtype=np.float32)
    if weight.reads_confidence and len(pairs) > 1 and confidences.min() == confidences.max():
        weights.checked(confidences)
        raise DatasetError(
            f"all {len(pairs):,} pairs have the same confidence, {confidences[0]:g}, which gives "
            "them the same weight: check the annotator, or use --weight none"
        )
    values = weights.checked(weight.function(confidences, **constants))
    if by_prompt:
        values = weights.per_prompt(values, [pair.prompt_pairs or 1 for pair in pairs])
    return weights.normalise(values) if normalise and not weight.selects else values


def _pair(number: int, row: Row, *, column: str) -> WeightedPair | None:
    """The pair in a row; None for a tie. Raises: BadRowError."""
    triplet = triplet_in(number, row)
    if is_tie(triplet, row):
        return None
    value = confidence_in(row, column)
    if not value and not _names_winner(row):
        return None
    return WeightedPair(
        str(triplet.id),
        triplet.prompt,
        triplet.response_a,
        triplet.response_b,
        value,
        _prompt_pairs(row),
    )


def _names_winner(row: Row) -> bool:
    return isinstance(row, dict) and row.get("preferred") in ("a", "b")


def _prompt_pairs(row: Row) -> int | None:
    """The number of pairs of the row's prompt. Raises: BadRowError where it is none."""
    if not isinstance(row, dict) or "prompt_pairs" not in row:
        return None
    value = row["prompt_pairs"]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRowError.invalid(f"prompt_pairs is not a number from 1: {value!r}")
    return value


def confidence_in(row: Row, column: str = "confidence") -> float:
    """The confidence of a row, in [0, 1]. Raises: BadRowError where it has none."""
    value = row.get(column) if isinstance(row, dict) else None
    if value is None:
        raise BadRowError.invalid(f"{column} is missing{_hint(column)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRowError.invalid(f"{column} is not a number: {value!r}")
    if not 0 <= value <= 1:
        raise BadRowError.invalid(f"{column} is {value}, which is not in [0, 1]")
    return float(value)


def _hint(column: str) -> str:
    if column == "confidence":
        return "; `cwpo annotate` writes it"
    return "; the annotator that wrote this file has no calibration temperature"
