"""Rows in whatever form Python has them: models, dictionaries, tables, datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from cwpo import columns
from cwpo.datasets import hub
from cwpo.errors import DatasetError

# Rows of a table that are Python objects at a time.
_SLICE_ROWS = 1024


class ArrowStream(Protocol):
    """A table of pyarrow, pandas (2.2 or later), polars and others.

    https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html
    """

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The rows, as Arrow's C interface passes them on."""


Rows = Iterable[Any] | ArrowStream
"""Dictionaries or models: a list, an iterator, a `datasets.Dataset`; or a table."""


def records(rows: object) -> Iterator[Any]:
    """Each row, as a dictionary or as the model that was given; of a table, a few at a time.

    Raises: DatasetError for what has no rows.
    """
    if isinstance(rows, Mapping):
        names = ", ".join(map(repr, list(rows)[:8]))
        raise DatasetError(
            f"a dictionary with the keys {names} is no list of rows: give a list of such "
            "dictionaries, or one split of a DatasetDict, such as dataset['train']"
        )
    if isinstance(rows, str) and hub.is_hub(rows):
        return hub.rows(rows)
    if isinstance(rows, str | bytes | Path):
        raise DatasetError(
            "a path is no list of rows: submit the file as a job (client.jobs.submit), or annotate "
            "it with `cwpo annotate`; a dataset of the Hub is hub:owner/name@split"
        )
    if isinstance(rows, pa.RecordBatch):
        return _table_records(pa.Table.from_batches([rows]).to_reader())
    if hasattr(rows, "__arrow_c_stream__"):
        return _table_records(pa.RecordBatchReader.from_stream(rows))
    if not isinstance(rows, Iterable):
        raise DatasetError(
            f"a {type(rows).__name__} has no rows to read: give a list or an iterator of "
            "dictionaries, a datasets.Dataset, or a table of pandas, polars or Arrow (a LazyFrame "
            "after collect())"
        )
    return iter(rows)


def count(rows: Rows) -> int | None:
    """How many rows there are, if that is known before they are read."""
    return len(rows) if isinstance(rows, Sized) and not isinstance(rows, str) else None


def _table_records(reader: pa.RecordBatchReader) -> Iterator[dict[str, Any]]:
    for batch in reader:
        for start in range(0, batch.num_rows, _SLICE_ROWS):
            yield from columns.with_text(batch.slice(start, _SLICE_ROWS)).to_pylist()
