"""The rows of a shard in the store: a Parquet table of triplets, and of lists of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from pydantic_core import to_json

from cwpo.datasets.ranked import count_pairs
from cwpo.datasets.triplets import NumberedItem, NumberedRow, NumberedTriplet
from cwpo.datasets.weighted import plain_prompt, prompt_type
from cwpo.types import Pairs, Prompt, RankItem, Triplet
from cwpo_worker.errors import StoreError

_TRIPLET = ("id", "prompt", "response_a", "response_b")
_ITEM = ("id", "prompt", "responses")
_COLUMNS = (*_TRIPLET, "responses", "extra")
_TRIPLETS = TypeAdapter(list[Triplet])
_ITEMS = TypeAdapter(list[RankItem])


class ShardRows:
    """The rows of the next shard; `extra` is JSON, or null if there is none.

    A row has either response_a and response_b, or responses; a shard of triplets alone has no
    column `responses`.

    characters: total length of all texts so far, as often as the dataset will have them.
    size: work so far, and rows of the dataset, in triplets.
    """

    def __init__(self, pairs: Pairs | None = None) -> None:
        self.characters = 0
        self.size = 0
        self.numbers: list[int] = []
        self._pairs = pairs
        self._rows: list[tuple[Any, ...]] = []

    @classmethod
    def read(cls, blob: bytes, characters: int, pairs: Pairs | None = None) -> ShardRows:
        """Rows that `write` wrote, to be continued. Raises: StoreError for anything else."""
        table = read_shard(blob)
        rows = cls(pairs)
        rows.characters = characters
        rows.numbers = table["row"].to_pylist()
        columns = [
            table[name].to_pylist() if name in table.column_names else [None] * len(table)
            for name in _COLUMNS
        ]
        rows._rows = [*zip(*columns, strict=True)]
        rows.size = sum(
            1 if responses is None else rows._size_of(len(responses))
            for responses in columns[_COLUMNS.index("responses")]
        )
        return rows

    def add(self, row: NumberedRow) -> None:
        """Append a row; either all rows have text prompts, or all have chat prompts."""
        given = row.prompt
        prompt = plain_prompt(given)
        extra = to_json(row.extra) if row.extra else None
        once = _length(given) + (len(extra) if extra else 0)
        self.numbers.append(row.row)
        if isinstance(row, NumberedTriplet):
            triplet = row.triplet
            two = (triplet.response_a, triplet.response_b)
            self._rows.append((triplet.id, prompt, *two, None, extra))
            self.size += 1
            self.characters += once + len(two[0]) + len(two[1])
        else:
            responses = row.item.responses
            self._rows.append((row.item.id, prompt, None, None, responses, extra))
            self.size += self._size_of(len(responses))
            self.characters += _repeated(once, responses, self._pairs)

    def _size_of(self, responses: int) -> int:
        """As many triplets as have so many responses, or as the dataset has pairs of them."""
        return max(responses // 2, _pairs_of(responses, self._pairs))

    def write(self, sink: BinaryIO) -> None:
        """Write the rows, at least one, as a table."""
        columns = dict(zip(_COLUMNS, zip(*self._rows, strict=True), strict=True))
        has_lists = any(each is not None for each in columns["responses"])
        schema = _schema(is_chat=not isinstance(columns["prompt"][0], str), has_lists=has_lists)
        if not has_lists:
            del columns["responses"]
        table = pa.Table.from_pydict({"row": self.numbers, **columns}, schema=schema)
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)


def characters_in_dataset(row: NumberedItem, pairs: Pairs | None) -> int:
    """Length of the texts of a row, as often as the dataset will have them."""
    extra = len(to_json(row.extra)) if row.extra else 0
    return _repeated(_length(row.prompt) + extra, row.item.responses, pairs)


def _repeated(once: int, responses: Sequence[str], pairs: Pairs | None) -> int:
    """The same, where `once` is what each pair has beside its responses."""
    total = sum(map(len, responses))
    of_pair = once + 2 * total // len(responses)
    return max(_pairs_of(len(responses), pairs) * of_pair, once + total)


def _pairs_of(responses: int, pairs: Pairs | None) -> int:
    return 1 if pairs is None else count_pairs(responses, pairs)


def _length(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def read_shard(blob: bytes) -> pa.Table:
    """The table that `ShardRows` wrote. Raises: StoreError for anything else."""
    try:
        # It is in memory: to read ahead would only start threads in a forked task.
        with pq.ParquetFile(pa.BufferReader(blob), pre_buffer=False) as file:
            table = file.read(use_threads=False)
        is_chat = table.schema.field("prompt").type != pa.string()
        return table.cast(_schema(is_chat=is_chat, has_lists="responses" in table.column_names))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        # Without the cause, whose text could show a row.
        raise StoreError("a shard in the store is damaged: it is no table of rows") from None


def numbered_triplets(table: pa.Table) -> list[NumberedTriplet]:
    """The rows of such a table of triplets alone, without their extra columns."""
    triplets = _TRIPLETS.validate_python(table.select(_TRIPLET).to_pylist())
    return [
        NumberedTriplet(row, triplet)
        for row, triplet in zip(table["row"].to_pylist(), triplets, strict=True)
    ]


def numbered_rows(table: pa.Table) -> Sequence[NumberedRow]:
    """The rows of such a table, without their extra columns."""
    if "responses" not in table.column_names:
        return numbered_triplets(table)
    is_list = pc.is_valid(table["responses"])
    triplets = iter(numbered_triplets(table.filter(pc.invert(is_list))))
    lists = table.filter(is_list)
    items = _ITEMS.validate_python(lists.select(_ITEM).to_pylist())
    numbered = map(NumberedItem, lists["row"].to_pylist(), items)
    return [next(numbered) if listed else next(triplets) for listed in is_list.to_pylist()]


def _schema(*, is_chat: bool, has_lists: bool) -> pa.Schema:
    text = pa.string()
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", text, nullable=False),
        pa.field("prompt", prompt_type(chat=is_chat), nullable=False),
        pa.field("response_a", text, nullable=has_lists),
        pa.field("response_b", text, nullable=has_lists),
    ]
    if has_lists:
        fields.append(pa.field("responses", pa.list_(text)))
    return pa.schema([*fields, pa.field("extra", pa.binary())])
