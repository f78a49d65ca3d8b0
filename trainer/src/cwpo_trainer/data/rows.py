"""Rows of the files that the trainer reads, and the triplet in each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
from cwpo_trainer.data.unused_rows import BadRowError, NumberedRow, Row
from cwpo_trainer.run.chunks import counted

COUNTED_AT_ONCE = 10_000


def file_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, in order, with progress for many.

    The rows of a folder of Parquet files are numbered through all of them.
    Raises: DatasetError where the file cannot be read; see `dataset_files` for a folder.
    """
    rows = rows_through(map(_rows, dataset_files(path)))
    yield from counted(rows, COUNTED_AT_ONCE, work=f"read {path.name}", unit="rows")


def _rows(path: Path) -> Iterator[NumberedRow]:
    try:
        with path.open("rb") as stream:
            yield from read_rows(stream, file_format(path))
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error


def triplet_in(number: int, row: Row) -> Triplet:
    """The row as a triplet. Raises: BadRowError where it is none."""
    parsed = parse_triplet(number, row)
    if isinstance(parsed, RejectedRow):
        raise BadRowError(parsed.error)
    return parsed.triplet


def is_tie(triplet: Triplet, row: Row) -> bool:
    """Whether no response is preferred: both are the same, or the row says so."""
    if triplet.response_a == triplet.response_b:
        return True
    return isinstance(row, dict) and row.get("preferred") == "tie"
