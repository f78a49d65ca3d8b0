"""Reads the rows of a Parquet file in pieces of limited size.

A file of a few hundred bytes may contain the same long text a million times. Texts are therefore
kept dictionary-encoded, as in the file, until a few rows at a time become Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cwpo import columns

_BATCH_ROWS = 1024
_SLICE_BYTES = 8 << 20


def read_rows(source: BinaryIO, longest: int) -> Iterator[dict[str, Any] | str]:
    """Each row as an object, or the reason why it is rejected: it is longer than `longest` bytes.

    Raises: pa.ArrowException if the file cannot be read.
    """
    metadata = pq.read_metadata(source)
    with pq.ParquetFile(
        source, metadata=metadata, read_dictionary=_texts(metadata), pre_buffer=False
    ) as file:
        for batch in _batches(file):
            sizes = row_bytes(batch)
            plain = pa.schema([field.with_type(_plain(field.type)) for field in batch.schema])
            for rows in _slices(sizes, min(_SLICE_BYTES, longest)):
                if sizes[rows.start] > longest:
                    yield f"the row is longer than {longest:,} bytes"
                else:
                    # Not a slice: casting one casts the nested columns of all rows.
                    some = batch.take(pa.array(rows)).cast(plain)
                    yield from columns.with_text(some).to_pylist()


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    # One row group at a time: pyarrow cannot combine dictionaries of nested columns.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(_BATCH_ROWS, row_groups=[group])


def row_bytes(batch: pa.RecordBatch) -> list[int]:
    """Size of the texts and numbers of each row, in bytes."""
    total = pa.repeat(pa.scalar(0, pa.int64()), batch.num_rows)
    for column in batch.columns:
        total = pc.add(total, _cell_bytes(column))
    sizes: list[int] = total.to_pylist()
    return sizes


def _texts(metadata: pq.FileMetaData) -> list[str]:
    """Paths of the columns, and of the fields of nested columns, that contain text."""
    leaves = map(metadata.schema.column, range(len(metadata.schema)))
    return [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionary encoding, from which pyarrow creates Python objects faster."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _cell_bytes(array: pa.Array) -> pa.Int64Array:
    kind = array.type
    if pa.types.is_dictionary(kind):
        sizes = _cell_bytes(array.dictionary).take(array.indices)
    elif pa.types.is_struct(kind):
        sizes = pa.repeat(pa.scalar(0, pa.int64()), len(array))
        for part in array.flatten():
            sizes = pc.add(sizes, _cell_bytes(part))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        sizes = _list_bytes(array)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind) or _is_large(kind):
        sizes = pc.binary_length(array).cast(pa.int64())
    else:
        sizes = pa.repeat(pa.scalar(array.nbytes // max(len(array), 1), pa.int64()), len(array))
    return sizes.fill_null(0)


def _list_bytes(array: pa.Array) -> pa.Int64Array:
    """Size of each list: that of its elements, and eight bytes for each."""
    lengths = pc.fill_null(pc.list_value_length(array).cast(pa.int64()), 0)
    of_elements = pc.add(_cell_bytes(pc.list_flatten(array)), 8)
    until = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(of_elements)])
    ends = pc.cumulative_sum(lengths)
    return pc.subtract(until.take(ends), until.take(pc.subtract(ends, lengths)))


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind))


def _slices(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Ranges of rows of at most `most` bytes together; a longer row is a range of its own."""
    start = total = 0
    for at, size in enumerate(sizes):
        if at > start and total + size > most:
            yield range(start, at)
            start, total = at, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))
