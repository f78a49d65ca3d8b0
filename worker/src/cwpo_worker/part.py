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
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic_core import from_json

from cwpo import columns
from cwpo.columns import Column
from cwpo.datasets import ParquetWriter, RejectedRow, weighted_schema
from cwpo.types import Annotation, FailedAnnotation, ModelRef
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
    rows: pa.Table,
    labels: Sequence[Annotation | FailedAnnotation],
    model: ModelRef | None,
    *,
    extra: Sequence[Column] = (),
) -> None:
    """Publish a part, unless there is one already.

    Args:
        rows: of the shard, as cwpo_worker.rows reads them.
        labels: of the rows, in order.
        extra: the columns of the whole input beside its triplets.
    """
    good = [label for label in labels if isinstance(label, Annotation)]
    errors: list[dict[str, Any]] = []
    if len(good) < len(labels):
        is_good = [isinstance(label, Annotation) for label in labels]
        errors = _errors(rows, labels)
        rows = rows.filter(pa.array(is_good))
    table = _weighted(rows, good, model, extra)
    metadata = {**(table.schema.metadata or {}), _ERRORS: json.dumps(errors)}
    with store.create(key) as sink:
        writer = ParquetWriter(sink)
        writer.write_table(table.replace_schema_metadata(metadata))
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


def _errors(
    rows: pa.Table, labels: Sequence[Annotation | FailedAnnotation]
) -> list[dict[str, Any]]:
    named = zip(rows["row"].to_pylist(), rows["id"].to_pylist(), labels, strict=True)
    return [
        RejectedRow(row, row_id, label.error).as_dict()
        for row, row_id, label in named
        if isinstance(label, FailedAnnotation)
    ]


def _weighted(
    rows: pa.Table, labels: Sequence[Annotation], model: ModelRef | None, extra: Sequence[Column]
) -> pa.Table:
    """What `cwpo.datasets.weighted_row` makes of each row, a column at a time."""
    is_chat = rows.schema.field("prompt").type != pa.string()
    is_calibrated = bool(labels) and labels[0].calibrated_confidence is not None
    a_first = pa.array([label.preferred != "b" for label in labels], pa.bool_())
    score_a = pa.array([label.score_a for label in labels], pa.float32())
    score_b = pa.array([label.score_b for label in labels], pa.float32())
    chosen = pc.if_else(a_first, rows["response_a"], rows["response_b"])
    rejected = pc.if_else(a_first, rows["response_b"], rows["response_a"])
    values = {
        "id": rows["id"],
        "prompt": rows["prompt"],
        "chosen": _as_turns(chosen) if is_chat else chosen,
        "rejected": _as_turns(rejected) if is_chat else rejected,
        "confidence": [label.confidence for label in labels],
        "score_chosen": pc.if_else(a_first, score_a, score_b),
        "score_rejected": pc.if_else(a_first, score_b, score_a),
        "preferred": [label.preferred for label in labels],
    }
    if is_calibrated:
        values["calibrated_confidence"] = [label.calibrated_confidence for label in labels]
    schema = weighted_schema(chat=is_chat, calibrated=is_calibrated, model=model, extra=extra)
    if extra:
        beside = [from_json(value) if value else {} for value in rows["extra"].to_pylist()]
        for column in extra:
            given = [row.get(column.name) for row in beside]
            values[column.name] = columns.stored(column.field(), given)
    return pa.Table.from_pydict(values, schema=schema)


def _as_turns(texts: pa.ChunkedArray) -> pa.Array:
    """Each text as a conversation of one assistant's turn."""
    contents = texts.combine_chunks()
    roles = pa.array(["assistant"] * len(contents), pa.string())
    turns = pa.StructArray.from_arrays([roles, contents], names=["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(len(contents) + 1), pa.int32()), turns)
