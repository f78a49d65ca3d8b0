"""The rows of a shard in the store: a Parquet table of numbered triplets."""

from __future__ import annotations

from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from pydantic_core import to_json

from cwpo.datasets.triplets import NumberedTriplet
from cwpo.datasets.weighted import plain_prompt, prompt_type
from cwpo.types import Triplet
from cwpo_worker.errors import StoreError

_TRIPLET = ("id", "prompt", "response_a", "response_b")
_COLUMNS = (*_TRIPLET, "extra")
_TRIPLETS = TypeAdapter(list[Triplet])


class ShardRows:
    """The rows of the next shard; `extra` is JSON, or null if there is none.

    characters: total length of all texts so far.
    """

    def __init__(self) -> None:
        self.characters = 0
        self.numbers: list[int] = []
        self._rows: list[tuple[Any, ...]] = []

    @classmethod
    def read(cls, blob: bytes, characters: int) -> ShardRows:
        """Rows that `write` wrote, to be continued. Raises: StoreError for anything else."""
        table = read_shard(blob)
        rows = cls()
        rows.characters = characters
        rows.numbers = table["row"].to_pylist()
        rows._rows = [*zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True)]
        return rows

    def add(self, row: NumberedTriplet) -> None:
        """Append a row; either all rows have text prompts, or all have chat prompts."""
        triplet = row.triplet
        prompt = plain_prompt(triplet.prompt)
        extra = to_json(row.extra) if row.extra else None
        self.numbers.append(row.row)
        self._rows.append((triplet.id, prompt, triplet.response_a, triplet.response_b, extra))
        texts = prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)
        self.characters += (
            len(texts) + len(triplet.response_a) + len(triplet.response_b) + len(extra or b"")
        )

    def write(self, sink: BinaryIO) -> None:
        """Write the rows, at least one, as a table."""
        columns = dict(zip(_COLUMNS, zip(*self._rows, strict=True), strict=True))
        schema = _schema(is_chat=not isinstance(columns["prompt"][0], str))
        table = pa.Table.from_pydict({"row": self.numbers, **columns}, schema=schema)
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)


def read_shard(blob: bytes) -> pa.Table:
    """The table that `ShardRows` wrote. Raises: StoreError for anything else."""
    try:
        # It is in memory: to read ahead would only start threads in a forked task.
        with pq.ParquetFile(pa.BufferReader(blob), pre_buffer=False) as file:
            table = file.read(use_threads=False)
        is_chat = table.schema.field("prompt").type != pa.string()
        return table.cast(_schema(is_chat=is_chat))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        # Without the cause, whose text could show a row.
        raise StoreError("a shard in the store is damaged: it is no table of rows") from None


def numbered_triplets(table: pa.Table) -> list[NumberedTriplet]:
    """The rows of such a table, without their extra columns."""
    triplets = _TRIPLETS.validate_python(table.select(_TRIPLET).to_pylist())
    return [
        NumberedTriplet(row, triplet)
        for row, triplet in zip(table["row"].to_pylist(), triplets, strict=True)
    ]


def _schema(*, is_chat: bool) -> pa.Schema:
    fields = [("row", pa.int64()), ("id", pa.string()), ("prompt", prompt_type(chat=is_chat))]
    fields += [("response_a", pa.string()), ("response_b", pa.string())]
    required = [pa.field(name, kind, nullable=False) for name, kind in fields]
    return pa.schema([*required, pa.field("extra", pa.binary())])
