"""The part: the result of one shard, as one file.

It is a weighted dataset in Parquet whose metadata also holds the rows that failed. A blob is
published completely or not at all, so that the answers of two runs of a shard cannot mix.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic_core import from_json

from cwpo.columns import Column, stored
from cwpo.datasets.ranked import RankedPairs
from cwpo.datasets.triplets import RejectedRow
from cwpo.datasets.weighted import ParquetWriter, columns_beside, weighted_table
from cwpo.types import Annotation, Certificate, FailedAnnotation, ModelRef
from cwpo_worker.jobs.finished_shards import RowCounts
from cwpo_worker.storage.store import BlobStore

_ERRORS = b"cwpo.errors"
_SHARD = b"cwpo.shard"


class ShardEntry(NamedTuple):
    """What a part has to cover: how many rows its shard has, and the first and last number."""

    rows: int
    first_row: int
    last_row: int


@dataclass(frozen=True, slots=True)
class Part:
    """The result of one shard.

    shard: what it has to cover; None in a part that version 0.2 wrote.
    counts: the numbers of its rows. errors: lines of the errors file, by row. schema: that of the
    weighted dataset. content: the file itself.
    """

    shard: ShardEntry | None
    counts: RowCounts
    errors: list[dict[str, Any]]
    schema: pa.Schema
    content: bytes

    @property
    def columns(self) -> list[Column]:
        """The extra columns of its rows."""
        return columns_beside(self.schema)

    @property
    def confidences(self) -> pa.ChunkedArray:
        """The confidences of its rows."""
        with pq.ParquetFile(pa.BufferReader(self.content), pre_buffer=False) as file:
            return file.read(["confidence"], use_threads=False)["confidence"]

    def rows(self) -> pa.Table:
        """The annotated rows, as a table of the weighted dataset."""
        # It is in memory: to read ahead would only start threads in a forked task.
        with pq.ParquetFile(pa.BufferReader(self.content), pre_buffer=False) as file:
            return file.read(use_threads=False).cast(self.schema)


def write_part(
    store: BlobStore,
    key: str,
    rows: pa.Table,
    labels: Sequence[Annotation | RankedPairs | FailedAnnotation],
    model: ModelRef | None,
    *,
    extra: Sequence[Column] = (),
    is_paired: bool = False,
    certificate: Certificate | None = None,
) -> RowCounts:
    """Publish a part, unless it exists already.

    Args:
        rows: rows of the shard, from `read_shard`.
        labels: their labels, in order.
        extra: the extra columns that are known of the input.
        is_paired: whether there is the column prompt_pairs.
        certificate: that of the column certified; None for no such column.
    Returns: the numbers of rows in the part that exists now.
    """
    good = [label for label in labels if not isinstance(label, FailedAnnotation)]
    errors: list[dict[str, Any]] = []
    numbers = rows["row"]
    shard = ShardEntry(len(rows), numbers[0].as_py(), numbers[-1].as_py())
    if len(good) < len(labels):
        is_good = [not isinstance(label, FailedAnnotation) for label in labels]
        errors = _errors(rows, labels)
        rows = rows.filter(pa.array(is_good))
    pairs = _Pairs.of(rows, good, is_paired=is_paired)
    table = weighted_table(
        pairs.rows["prompt"],
        (pairs.rows["response_a"], pairs.rows["response_b"]),
        pairs.annotations,
        model,
        _beside(pairs.rows["extra"], extra),
        pairs.prompt_pairs,
        certificate,
    )
    if not _publish(store, key, table, errors, shard):
        return read_row_counts(store, key)
    return RowCounts(len(good), len(errors), len(table))


def complete_part(
    store: BlobStore, key: str, part: Part, rows: pa.Table, extra: Sequence[Column]
) -> Part:
    """Publish a copy of a part with other extra columns, unless it exists already.

    Args:
        part: with an annotated row.
        rows: rows of its shard, from `read_shard`.
        extra: the extra columns of the whole input.
    Returns: the copy that exists now.
    """
    failed = pa.array([line["row"] for line in part.errors], pa.int64())
    table = part.rows()
    good = rows.filter(pc.invert(pc.is_in(rows["row"], failed)))["extra"]
    if "prompt_pairs" in table.column_names:
        good = good.take(pa.array(_rows_of_pairs(table["prompt_pairs"].to_pylist())))
    values = _beside(good, extra)
    table = table.drop_columns([column.name for column in part.columns])
    for column in extra:
        field = column.field()
        table = table.append_column(field, [pa.array(stored(field, values[column]), field.type)])
    _publish(store, key, table, part.errors, part.shard)
    return read_part(store, key)


def read_part(store: BlobStore, key: str) -> Part:
    """The part with this key. Raises: BlobNotFoundError."""
    content = store.read(key)
    with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
        shard, errors, schema = _described(file)
        counts = _counts(file, schema, errors)
    return Part(shard, counts, errors, schema, content)


def read_row_counts(store: BlobStore, key: str) -> RowCounts:
    """The numbers of rows in a part, without reading their texts. Raises: BlobNotFoundError."""
    with store.open(key) as source, pq.ParquetFile(source) as file:
        _, errors, schema = _described(file)
        return _counts(file, schema, errors)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What the rows of a shard become: a row for each pair of responses.

    rows: a table of triplets. annotations: their labels. prompt_pairs: as a column of the dataset.
    """

    rows: pa.Table
    annotations: Sequence[Annotation]
    prompt_pairs: Sequence[int] | None

    @classmethod
    def of(
        cls, rows: pa.Table, labels: Sequence[Annotation | RankedPairs], *, is_paired: bool
    ) -> _Pairs:
        """The pairs of rows with these labels, in the order of the rows."""
        if "responses" not in rows.column_names:
            annotations = [label for label in labels if isinstance(label, Annotation)]
            return cls(rows, annotations, [1] * len(annotations) if is_paired else None)
        responses = rows["responses"].to_pylist()
        row: list[int] = []
        a: list[str] = []
        b: list[str] = []
        annotations, prompt_pairs = [], []
        two = zip(rows["response_a"].to_pylist(), rows["response_b"].to_pylist(), strict=True)
        for at, (label, listed, of_triplet) in enumerate(zip(labels, responses, two, strict=True)):
            if isinstance(label, Annotation):
                pairs = [(*of_triplet, label)]
            else:
                pairs = [(listed[pair.a], listed[pair.b], pair.label) for pair in label.pairs]
            for of_a, of_b, annotation in pairs:
                row.append(at)
                a.append(of_a)
                b.append(of_b)
                annotations.append(annotation)
                prompt_pairs.append(len(pairs))
        table = rows.select(["prompt", "extra"]).take(pa.array(row, pa.int64()))
        text = pa.string()
        table = table.append_column("response_a", pa.chunked_array([pa.array(a, text)]))
        table = table.append_column("response_b", pa.chunked_array([pa.array(b, text)]))
        return cls(table, annotations, prompt_pairs)


def _rows_of_pairs(prompt_pairs: Sequence[int]) -> list[int]:
    """The place of each pair's row among the rows of its shard that are annotated."""
    rows: list[int] = []
    place = 0
    while len(rows) < len(prompt_pairs):
        rows += [place] * prompt_pairs[len(rows)]
        place += 1
    return rows


def _counts(file: pq.ParquetFile, schema: pa.Schema, errors: list[dict[str, Any]]) -> RowCounts:
    """The numbers of rows; of pairs, those that are together one row of the input count as one."""
    pairs = file.metadata.num_rows
    if "prompt_pairs" not in schema.names or not pairs:
        return RowCounts(pairs, len(errors), pairs)
    column = file.read(["prompt_pairs"], use_threads=False)["prompt_pairs"]
    counts = Counter(column.to_pylist())
    return RowCounts(sum(count // of_row for of_row, count in counts.items()), len(errors), pairs)


def _publish(
    store: BlobStore,
    key: str,
    table: pa.Table,
    errors: list[dict[str, Any]],
    shard: ShardEntry | None,
) -> bool:
    """Write a part; returns whether none existed yet."""
    described = {_ERRORS: json.dumps(errors), _SHARD: json.dumps(shard)}
    metadata = {**(table.schema.metadata or {}), **described}
    with store.create(key) as sink:
        writer = ParquetWriter(sink)
        writer.write_table(table.replace_schema_metadata(metadata))
        writer.close()
    return bool(sink.published)


def _described(
    file: pq.ParquetFile,
) -> tuple[ShardEntry | None, list[dict[str, Any]], pa.Schema]:
    """The shard and the errors of a part, and the schema of its rows, which goes without them."""
    schema = file.schema_arrow
    metadata = dict(schema.metadata)
    errors = json.loads(metadata.pop(_ERRORS))
    entry = metadata.pop(_SHARD, None)
    shard = None if entry is None else ShardEntry(*json.loads(entry))
    return shard, errors, schema.with_metadata(metadata or None)


def _errors(
    rows: pa.Table, labels: Sequence[Annotation | RankedPairs | FailedAnnotation]
) -> list[dict[str, Any]]:
    named = zip(rows["row"].to_pylist(), rows["id"].to_pylist(), labels, strict=True)
    return [
        RejectedRow(row, row_id, label.error).as_dict()
        for row, row_id, label in named
        if isinstance(label, FailedAnnotation)
    ]


def _beside(extra: pa.ChunkedArray, known: Sequence[Column]) -> dict[Column, list[Any]]:
    """The columns beside the triplets, from the JSON object that each row has or not."""
    if not known:
        return {}
    rows = [from_json(value) if value else {} for value in extra.to_pylist()]
    return {column: [row.get(column.name) for row in rows] for column in known}
