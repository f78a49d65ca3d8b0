"""Writing labelled pairs: JSON lines or Parquet, whose metadata says where they come from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from cwpo.datasets.triplets import file_format
from cwpo.datasets.weighted import plain_prompt, prompt_type
from cwpo.partial_file import partial_file
from cwpo_trainer.data.labelled import LabelledPair

# Key of the metadata of a Parquet file: the command that wrote it, and what it did, as JSON.
PROVENANCE = b"cwpo.provenance"
_WRITTEN_AT_ONCE = 4096

Rows = Iterable[Mapping[str, Any]]


def labelled_row(
    pair: LabelledPair, *, a_is_chosen: bool, is_flipped: bool = False
) -> dict[str, Any]:
    """The pair as a row: id, prompt, response_a, response_b, preferred, and source if it is known.

    Args:
        a_is_chosen: whether response_a is the pair's chosen response.
        is_flipped: the row prefers the other response than the pair does.
    """
    responses = (pair.chosen, pair.rejected) if a_is_chosen else (pair.rejected, pair.chosen)
    return {
        "id": pair.id,
        "prompt": plain_prompt(pair.prompt),
        "response_a": responses[0],
        "response_b": responses[1],
        "preferred": "a" if a_is_chosen != is_flipped else "b",
        **({} if pair.source is None else {"source": pair.source}),
    }


def write_labelled(path: Path, rows: Rows, provenance: Mapping[str, JsonValue]) -> None:
    """Write rows as of `labelled_row`, which may have the column flipped; the file appears whole.

    Args:
        path: .jsonl, .jsonl.gz or .parquet; only the last holds the provenance.
    Raises: DatasetError for another suffix, before a row is read.
    """
    format = file_format(path)
    ahead = iter(rows)
    with partial_file(path) as sink:
        if format == "parquet":
            _write_parquet(sink, ahead, provenance)
        elif format == "jsonl.gz":
            with gzip.GzipFile(fileobj=sink, mode="wb", mtime=0) as compressed:
                _write_lines(compressed.write, ahead)
        else:
            _write_lines(sink.write, ahead)


def read_provenance(path: Path) -> dict[str, JsonValue] | None:
    """What the metadata of a Parquet file says of where its pairs come from; None for nothing."""
    noted = (pq.read_schema(path).metadata or {}).get(PROVENANCE)
    return None if noted is None else json.loads(noted)


def _write_lines(write: Callable[[bytes], Any], rows: Iterator[Mapping[str, Any]]) -> None:
    for row in rows:
        write((json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def _write_parquet(
    sink: BinaryIO, rows: Iterator[Mapping[str, Any]], provenance: Mapping[str, JsonValue]
) -> None:
    with _parquet_writer(sink, provenance) as write:
        while some := [*islice(rows, _WRITTEN_AT_ONCE)]:
            write(some)


@contextmanager
def _parquet_writer(
    sink: BinaryIO, provenance: Mapping[str, JsonValue]
) -> Iterator[Callable[[list[Mapping[str, Any]]], None]]:
    """A function that writes rows as a row group; the first row tells whether prompts are chats."""
    writer: pq.ParquetWriter | None = None

    def write(rows: list[Mapping[str, Any]]) -> None:
        nonlocal writer
        if writer is None:
            chat = not isinstance(rows[0]["prompt"], str)
            schema = _schema(chat=chat, flipped="flipped" in rows[0], provenance=provenance)
            writer = pq.ParquetWriter(sink, schema, compression="zstd")
        writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))

    yield write
    if writer is not None:
        writer.close()


def _schema(*, chat: bool, flipped: bool, provenance: Mapping[str, JsonValue]) -> pa.Schema:
    texts = ("response_a", "response_b", "preferred")
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", prompt_type(chat=chat), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in texts),
        pa.field("source", pa.string()),
    ]
    if flipped:
        fields.append(pa.field("flipped", pa.bool_(), nullable=False))
    return pa.schema(fields, metadata={PROVENANCE: json.dumps(provenance)})
