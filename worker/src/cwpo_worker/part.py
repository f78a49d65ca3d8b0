"""The part: what became of the rows of one shard, as one file.

It is a weighted dataset in Parquet whose metadata also holds the rows that failed. A single blob
is published whole or not at all, so that two runs of one shard cannot mix their answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cwpo.columns import Column
from cwpo.datasets import ParquetWriter, RejectedRow, weighted_schema, weighted_table
from cwpo.types import ModelRef
from cwpo_worker.store import BlobStore

_ERRORS = b"cwpo.errors"


@dataclass(frozen=True, slots=True)
class Part:
    """What a part says of itself.

    errors: lines of the errors file, by row. schema: of its rows, with the annotator's name.
    """

    annotated: int
    errors: list[dict[str, Any]]
    schema: pa.Schema


def write(
    store: BlobStore,
    key: str,
    rows: Sequence[dict[str, Any]],
    errors: Sequence[RejectedRow],
    model: ModelRef | None,
    *,
    extra: Sequence[Column] = (),
) -> None:
    """Publish a part, unless there is one already."""
    schema = weighted_schema(
        chat=bool(rows) and not isinstance(rows[0]["prompt"], str),
        calibrated=bool(rows) and "calibrated_confidence" in rows[0],
        model=model,
        extra=extra,
    )
    failed = json.dumps([error.as_dict() for error in errors])
    schema = schema.with_metadata({**(schema.metadata or {}), _ERRORS: failed})
    with store.create(key) as sink:
        writer = ParquetWriter(sink)
        writer.write_table(weighted_table(rows, schema))
        writer.close()


def read(store: BlobStore, key: str) -> Part:
    """A part without its rows. Raises: BlobNotFoundError."""
    with store.open(key) as source, pq.ParquetFile(source) as file:
        return _described(file)


def read_table(store: BlobStore, key: str) -> pa.Table:
    """The rows of a part. Raises: BlobNotFoundError."""
    with store.open(key) as source, pq.ParquetFile(source) as file:
        return file.read(use_threads=False).cast(_described(file).schema)


def _described(file: pq.ParquetFile) -> Part:
    schema = file.schema_arrow
    metadata = dict(schema.metadata)
    errors = json.loads(metadata.pop(_ERRORS))
    return Part(file.metadata.num_rows, errors, schema.with_metadata(metadata or None))
