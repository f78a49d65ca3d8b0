"""Reading the weighted dataset that `cwpo annotate` and batch jobs write."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue

from cwpo.datasets.folder import dataset_files
from cwpo.datasets.triplets import file_format
from cwpo.datasets.weighted import annotator_of, certificate_in
from cwpo.errors import DatasetError
from cwpo.types import Certificate, ModelRef, Prompt
from cwpo_trainer import weights
from cwpo_trainer.data.conversations import beginnings
from cwpo_trainer.data.labelled import fingerprint, labelled_pairs
from cwpo_trainer.data.rows import file_rows, is_tie, triplet_in
from cwpo_trainer.data.unused_rows import BadRowError, Row, UnusedRows
from cwpo_trainer.run.resumption import sha256_of
from cwpo_trainer.settings.policy_training import Labels
from cwpo_trainer.weights import WEIGHTS


@dataclass(frozen=True, slots=True)
class WeightedPair:
    """A row of the weighted dataset; chosen is what the annotator prefers.

    prompt_pairs: number of pairs of the same prompt; None in a dataset of triplets.
    certified: whether a certificate of the annotator is of the label; None in a dataset without.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    confidence: float
    prompt_pairs: int | None = None
    certified: bool | None = None


@dataclass(frozen=True, slots=True)
class PairFile:
    """A file of pairs, and how it is read.

    labels: who chose between the responses; calibrated: take `calibrated_confidence` rather than
    `confidence`.
    """

    path: Path
    labels: Labels = "annotator"
    calibrated: bool = False

    def pairs(self, unused: UnusedRows) -> Iterator[WeightedPair]:
        """The pairs in order; see `read_weighted` and `read_human`."""
        if self.labels == "human":
            return read_human(self.path, unused)
        return read_weighted(self.path, unused, calibrated=self.calibrated)

    @property
    def fingerprint(self) -> str:
        """A hash of the contents, and of how they are read. Raises: DatasetError."""
        if self.labels == "human" and not self.path.exists():
            # A dataset of the Hub.
            contents = [fingerprint(labelled_pairs(str(self.path), UnusedRows(1)))]
        else:
            try:
                contents = [sha256_of(file) for file in dataset_files(self.path)]
            except OSError as error:
                raise DatasetError(f"{self.path}: {error.strerror}") from error
        parts = [self.labels, str(self.calibrated), *contents]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_weighted(
    path: Path, unused: UnusedRows | None = None, *, calibrated: bool = False
) -> Iterator[WeightedPair]:
    """The pairs of a weighted dataset, in order, without bad rows and ties.

    Args:
        path: Parquet, JSONL or JSONL.gz, or a folder of Parquet files.
        unused: takes the rows that are left out; without it, a bad row is an error.
        calibrated: take `calibrated_confidence` rather than `confidence`.
    Raises: DatasetError for a file that cannot be read; at its end naming the first of too many bad
        rows, or where only some of its pairs have `prompt_pairs` or `certified`.
    """
    column = "calibrated_confidence" if calibrated else "confidence"
    count = with_counts = with_certified = 0
    parse = partial(_pair, column=column)
    for pair in (unused or UnusedRows()).used(file_rows(path), path, parse):
        count += 1
        with_counts += pair.prompt_pairs is not None
        with_certified += pair.certified is not None
        yield pair
    if not count:
        raise DatasetError(f"{path}: holds no pairs")
    if with_counts not in (0, count):
        raise DatasetError(
            f"{path}: {with_counts:,} of {count:,} rows have prompt_pairs: give the others "
            "the column too, 1 for a triplet"
        )
    if with_certified not in (0, count):
        raise DatasetError(
            f"{path}: {with_certified:,} of {count:,} rows have certified: annotate all of them "
            "with --max-error"
        )


def read_human(path: Path, unused: UnusedRows) -> Iterator[WeightedPair]:
    """Human-labelled pairs, in order, each with confidence 1: the baseline C = 1.

    Args:
        unused: takes the rows that are left out.
    Raises: DatasetError as `labelled_pairs` does.
    """
    for pair in labelled_pairs(str(path), unused):
        yield WeightedPair(pair.id, pair.prompt, pair.chosen, pair.rejected, 1.0)


def read_annotator(path: Path) -> ModelRef | None:
    """The annotator that wrote a weighted dataset; None where the file does not say (JSONL).

    Raises: DatasetError for a folder whose files are not all of one annotator.
    """
    first, *others = files = dataset_files(path)
    annotator, *rest = [_annotator_of(file) for file in files]
    for file, other in zip(others, rest, strict=True):
        if other != annotator:
            raise DatasetError(
                f"{path}: {first.name} and {file.name} are not of one annotator, and their "
                "confidences do not compare: train on one of them"
            )
    return annotator


def _annotator_of(file: Path) -> ModelRef | None:
    schema = _schema(file)
    return None if schema is None else annotator_of(schema)


def _schema(file: Path) -> pa.Schema | None:
    """The schema of a Parquet file; None of JSONL. Raises: DatasetError."""
    if file_format(file) != "parquet":
        return None
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{file}: not a readable Parquet file: {error}") from error


def read_certificate(path: Path) -> Certificate | None:
    """The certificate of a weighted dataset; None where it has none, or does not say so (JSONL).

    Raises: DatasetError for a folder whose files are not all of one certificate.
    """
    schemas = [_schema(file) for file in dataset_files(path)]
    certificate, *others = [None if each is None else certificate_in(each) for each in schemas]
    if any(other != certificate for other in others):
        raise DatasetError(f"{path}: its files are not of one certificate: name --epsilon")
    return certificate


def annotator_results(path: Path, labels: str) -> dict[str, JsonValue]:
    """For run.json: name and revision of the annotator that labelled the pairs, where known.

    Args:
        labels: what --labels says; people have no revision.
    """
    annotator = read_annotator(path) if labels == "annotator" else None
    return {} if annotator is None else {"annotator": annotator.model_dump()}


def evaluation_rows(prompts: Sequence[Prompt], fraction: float, *, seed: int) -> NDArray[np.bool_]:
    """Which pairs to keep for evaluation, shape (pairs,): a share of the conversations, by hash.

    SFT and alignment keep the same ones of a dataset, since all of its prompts count. Two datasets
    keep the same ones as far as they have the beginnings of their conversations in common.

    Args:
        prompts: one for each pair.
    Raises: DatasetError when no pair is left for either side.
    """
    conversations = beginnings(prompts)
    kept = np.array([_share(beginning, seed) < fraction for beginning in conversations])
    if kept.all() or not kept.any():
        raise DatasetError(
            f"{len(prompts):,} pairs are too few to evaluate on {fraction:.0%} of them: "
            "give --eval-data"
        )
    return kept


def _share(beginning: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone, spread evenly over texts."""
    digest = hashlib.sha256(f"{seed}:{beginning}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def weights_of(
    confidences: NDArray[np.float32],
    name: str,
    *,
    normalise: bool,
    prompt_pairs: NDArray[np.integer[Any]] | None = None,
    certified: NDArray[np.bool_] | None = None,
    **constants: float,
) -> NDArray[np.float32]:
    """The weight of each pair in the loss, shape (pairs,).

    Args:
        name: of WEIGHTS.
        normalise: divide by the mean, unless the weight only selects pairs.
        prompt_pairs: numbers of pairs of the same prompt to divide by, shape (pairs,).
        certified: which labels are certified, shape (pairs,); None in a dataset that does not tell.
        constants: arguments of the weight's function.
    Raises: DatasetError if all are 0, all pairs have the same confidence to weight them by, or the
        weight asks which are certified and the dataset does not tell.
    """
    weight = WEIGHTS[name]
    count = len(confidences)
    if weight.reads_confidence and count > 1 and confidences.min() == confidences.max():
        weights.checked(confidences)
        raise DatasetError(
            f"all {count:,} pairs have the same confidence, {confidences[0]:g}, which gives "
            "them the same weight: check the annotator, or use --weight none"
        )
    if weight.reads_certified:
        if certified is None:
            raise DatasetError(
                f"--weight {name}: the dataset has no column certified; `cwpo annotate "
                "--max-error` writes it"
            )
        if not certified.any():
            raise DatasetError(f"--weight {name}: none of {count:,} labels is certified")
        values = weight.function(certified)
    else:
        values = weights.checked(weight.function(confidences, **constants))
    if prompt_pairs is not None:
        values = weights.per_prompt(values, prompt_pairs)
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
        _certified(row),
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


def _certified(row: Row) -> bool | None:
    """Whether the row's label is certified. Raises: BadRowError where that is no boolean."""
    value = row.get("certified") if isinstance(row, dict) else None
    if value is not None and not isinstance(value, bool):
        raise BadRowError.invalid(f"certified is true or false, not {value!r}")
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
