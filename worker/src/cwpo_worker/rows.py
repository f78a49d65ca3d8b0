"""The rows of a shard as they lie in the store: one numbered triplet a line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from cwpo.datasets import NumberedTriplet
from cwpo_worker.errors import StoreError

_ROW = TypeAdapter(NumberedTriplet)


def encode(row: NumberedTriplet) -> bytes:
    """The row as a line."""
    return _ROW.dump_json(row) + b"\n"


def decode(lines: BinaryIO | Iterable[bytes]) -> list[NumberedTriplet]:
    """The rows of a shard. Raises: StoreError for a line that `encode` did not write."""
    try:
        return [_ROW.validate_json(line) for line in lines]
    except ValidationError:
        # Without the cause, whose text would show the row.
        raise StoreError("a shard in the store is damaged: a line of it is no row") from None
