"""Rows of the files that the trainer reads, and the two responses in each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cwpo.datasets.folder import dataset_files
from cwpo.datasets.triplets import (
    RejectedRow,
    file_format,
    parse_triplet,
    read_rows,
    rows_through,
)
from cwpo.errors import DatasetError
from cwpo.types import Triplet
from cwpo_trainer.run.chunks import counted

# The 1-based number of a row, and its object or the reason why it has none.
NumberedRow = tuple[int, dict[str, Any] | str]

COUNTED_AT_ONCE = 10_000


def file_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, in order, with progress for many.

    The rows of a folder of parts are numbered through all of them.
    Raises: DatasetError where the file cannot be read, or the folder lacks a part.
    """
    rows = rows_through(map(_rows, dataset_files(path)))
    yield from counted(rows, COUNTED_AT_ONCE, work=f"read {path.name}", unit="rows")


def _rows(path: Path) -> Iterator[NumberedRow]:
    try:
        with path.open("rb") as stream:
            yield from read_rows(stream, file_format(path))
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error


def two_responses(source: object, number: int, row: dict[str, Any] | str) -> Triplet:
    """The row as a triplet with two different responses.

    Args:
        source: where the row is from, for the message.
    Raises: DatasetError where it is none: what a model is trained on has to be right.
    """
    parsed = parse_triplet(number, row)
    if isinstance(parsed, RejectedRow):
        raise DatasetError(f"{source}: row {number}: {parsed.error.detail}")
    if parsed.triplet.response_a == parsed.triplet.response_b:
        raise DatasetError(
            f"{source}: row {number}: both responses are the same, so there is nothing to prefer: "
            "leave such rows out"
        )
    return parsed.triplet
