"""The extra columns of an input, which are not part of its triplets but kept in the dataset.

A row keeps its JSON values. In Parquet a column has one type, the simplest that holds every value
of the whole input unchanged: boolean, integer (64 bits), number (double),
text, or else JSON as text (arrays, objects, and values of mixed types).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from cwpo.errors import DatasetError

ColumnType = Literal["boolean", "integer", "number", "text", "json"]

MAX_COLUMNS = 1000
# What the annotation writes, and the names of responses that a row does not go by itself.
RESERVED = frozenset(
    {"response_a", "response_b", "chosen", "rejected"}
    | {"confidence", "calibrated_confidence", "score_chosen", "score_rejected", "prompt_pairs"}
    | {"certified"}
)
# preferred is a labelled triplet's own: the annotator's label takes its place.
_OURS = frozenset({"id", "prompt", "response_a", "response_b", "preferred"})
_TRL = frozenset({"id", "prompt", "chosen", "rejected", "preferred"})
# In Parquet, a row that lists its responses has the columns of the triplets beside it, without a
# value, and a triplet that of lists.
_LISTED = frozenset({"responses"})
_LIST = _OURS | _TRL | _LISTED

_ARROW: dict[ColumnType, pa.DataType] = {
    "boolean": pa.bool_(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "text": pa.string(),
    "json": pa.string(),
}
_TYPES = {arrow: known for known, arrow in _ARROW.items() if known != "json"}
_JSON = {b"cwpo.type": b"json"}
_KINDS = {type(None): "null", bool: "boolean", str: "text", float: "number"}
# Up to here a double holds every integer.
_EXACT = 2**53


class Column(BaseModel):
    """An extra column of an input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    type: ColumnType

    def field(self) -> pa.Field:
        """The Parquet field of the column; its metadata marks a column that holds JSON."""
        metadata = _JSON if self.type == "json" else None
        return pa.field(self.name, _ARROW[self.type], metadata=metadata)

    @classmethod
    def of(cls, field: pa.Field) -> Column:
        """The column that a Parquet field is of; it has to be one that `field` gave."""
        known: ColumnType = "json" if _is_json(field) else _TYPES[field.type]
        return cls(name=field.name, type=known)


class Columns:
    """The columns of an input and their types, learned row by row.

    Args:
        kinds: those of rows that were read before, from `kinds`.
    """

    def __init__(self, kinds: Mapping[str, Iterable[str]] | None = None) -> None:
        self._kinds = {name: set(given) for name, given in (kinds or {}).items()}

    @property
    def kinds(self) -> dict[str, list[str]]:
        """The kinds of the values in each column, as JSON: more than its type tells."""
        return {name: sorted(kinds) for name, kinds in self._kinds.items()}

    def learn(self, extra: Mapping[str, Any]) -> None:
        """Add the columns of one row. Raises: DatasetError for too many different columns."""
        for name, value in extra.items():
            self._kinds.setdefault(name, set()).add(_kind(value))
        self._expect_few()

    def learn_from(self, following: Columns) -> None:
        """Add the columns of rows that follow. Raises: DatasetError for too many columns."""
        for name, kinds in following._kinds.items():
            self._kinds.setdefault(name, set()).update(kinds)
        self._expect_few()

    def known(self) -> list[Column]:
        """The columns of all rows so far, in the order of their first appearance."""
        return [Column(name=name, type=_type(kinds)) for name, kinds in self._kinds.items()]

    def _expect_few(self) -> None:
        if len(self._kinds) > MAX_COLUMNS:
            raise DatasetError(
                f"the rows have more than {MAX_COLUMNS:,} different extra columns: "
                "put fields that vary from row to row into one column that holds an object"
            )


def lists_responses(row: Mapping[str, Any]) -> bool:
    """Whether a row has a list of responses, rather than the two of a triplet."""
    return row.get("responses") is not None and all(
        row.get(name) is None for name in ("response_a", "response_b", "chosen", "rejected")
    )


def has_extra(row: Mapping[str, Any]) -> bool:
    """Whether a row has more columns than those of its triplet."""
    return not row.keys() <= _own(row)


def reserved_name(row: Mapping[str, Any]) -> str | None:
    """The first column of a row whose name the annotation needs for its own; None for none."""
    return next((name for name in row if name in RESERVED and name not in _own(row)), None)


def extra_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The extra columns of a row, as JSON values; NaN and infinities become null.

    Raises: DatasetError for a value that cannot be written as JSON; UnicodeEncodeError for text
    that is not valid Unicode.
    """
    own = _own(row)
    extra = {name: value for name, value in row.items() if name not in own}
    try:
        json.dumps(extra, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise
    except ValueError:
        return {name: _finite(value) for name, value in extra.items()}
    except TypeError as error:
        raise DatasetError(f"the column {_foreign(extra)!r} cannot be kept: {error}") from error
    return extra


def _own(row: Mapping[str, Any]) -> frozenset[str]:
    """The columns of the triplet, or of the list of responses, that the row is."""
    own = _OURS if "response_a" in row else _TRL
    if "responses" not in row:
        return own
    if lists_responses(row):
        return _LIST
    return own | _LISTED if row["responses"] is None else own


def stored(field: pa.Field, values: Sequence[Any]) -> Sequence[Any]:
    """The values as the Parquet column holds them."""
    if not _is_json(field):
        return values
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, with the JSON of its text columns as values again."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for name in [field.name for field in table.schema if _is_json(field)]:
        for row in rows:
            if row[name] is not None:
                row[name] = json.loads(row[name])
    return rows


def with_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with dates, times and decimals as text, since JSON cannot express them."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type) or pa.types.is_decimal(field.type):
            batch = batch.set_column(index, field.name, batch.column(index).cast(pa.string()))
    return batch


def _is_json(field: pa.Field) -> bool:
    return (field.metadata or {}).get(b"cwpo.type") == b"json"


def _kind(value: Any) -> str:
    if type(value) is not int:
        return _KINDS.get(type(value), "nested")
    if -_EXACT <= value <= _EXACT:
        return "integer"
    return "long" if -(2**63) <= value < 2**63 else "huge"


def _type(kinds: set[str]) -> ColumnType:
    there = kinds - {"null"}
    if there <= {"text"}:
        return "text"
    if there == {"boolean"}:
        return "boolean"
    if there <= {"integer", "long"}:
        return "integer"
    return "number" if there <= {"integer", "number"} else "json"


def _finite(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _foreign(extra: Mapping[str, Any]) -> str:
    """The first column whose value is not JSON."""
    for name, value in extra.items():
        try:
            json.dumps(value)
        except TypeError:
            return name
    return ""
