"""Reading triplets and writing the weighted dataset, row by row, in constant memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from pydantic_core import from_json

from cwpo import columns
from cwpo.columns import Column
from cwpo.errors import DatasetError
from cwpo.texts import text_problem
from cwpo.types import (
    Annotation,
    FileFormat,
    ItemError,
    Message,
    ModelRef,
    Prompt,
    ResultFormat,
    Triplet,
)

MAX_LINE_BYTES = 64 << 20
_PARQUET_BATCH_ROWS = 1024
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def file_format(path: Path) -> FileFormat:
    """The format that a file's name says. Raises: DatasetError for any other name."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if name.endswith((".jsonl.gz", ".ndjson.gz")):
        return "jsonl.gz"
    if name.endswith(".parquet"):
        return "parquet"
    raise DatasetError(f"{path}: not a .jsonl, .jsonl.gz or .parquet file")


@dataclass(frozen=True, slots=True)
class NumberedTriplet:
    """A triplet (with an id), the 1-based number of its line or row, and what stood beside it."""

    row: int
    triplet: Triplet
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be annotated, and why; one line of the errors file."""

    row: int
    id: str | None
    error: ItemError

    def as_dict(self) -> dict[str, Any]:
        """The line of the errors file: row, id, code, detail."""
        return {
            "row": self.row,
            "id": self.id,
            "code": self.error.code,
            "detail": self.error.detail,
        }


def read_rows(source: BinaryIO, format: FileFormat) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The 1-based number and the object of each row, or the reason why it is none.

    Blank lines are not rows, but count as lines.
    Raises: DatasetError when the file as a whole cannot be read (no Parquet, cut gzip).
    """
    if format == "parquet":
        yield from _parquet_rows(source)
    elif format == "jsonl.gz":
        with gzip.open(source, "rb") as lines:
            yield from _json_rows(lines)
    else:
        yield from _json_rows(source)


def read_triplets(source: BinaryIO, format: FileFormat) -> Iterator[NumberedTriplet | RejectedRow]:
    """Each row as a triplet, or as rejected with the reason, in input order.

    Rows name their responses response_a and response_b, or chosen and rejected as TRL does (then
    a is chosen). A missing id becomes the row's number; a number as id becomes text. A file is of
    text prompts or of chat prompts throughout, as its first good row is.
    Raises: DatasetError as read_rows does, and for a column that cannot go along.
    """
    is_chat: bool | None = None
    for number, value in read_rows(source, format):
        row = parse_triplet(number, value)
        if isinstance(row, NumberedTriplet) and isinstance(value, dict):
            row = _with_extra(row, value)
        if isinstance(row, NumberedTriplet):
            chat = not isinstance(row.triplet.prompt, str)
            is_chat = chat if is_chat is None else is_chat
            if chat != is_chat:
                kinds = ("chat messages", "text") if chat else ("text", "chat messages")
                row = _rejected(
                    number,
                    row.triplet.id,
                    f"prompt is {kinds[0]} while the first rows hold {kinds[1]}: "
                    "split the file in two",
                )
        yield row


def parse_triplet(number: int, value: dict[str, Any] | str) -> NumberedTriplet | RejectedRow:
    """One row of read_rows as a triplet, or the reason why it is none."""
    if isinstance(value, str):
        return _rejected(number, None, value)
    given = value.get("id")
    row_id = str(number) if given is None else str(given)
    names = ("response_a", "response_b") if "response_a" in value else ("chosen", "rejected")
    missing = [name for name in ("prompt", *names) if value.get(name) is None]
    if missing:
        wanted = "prompt, response_a and response_b (or prompt, chosen and rejected)"
        return _rejected(number, row_id, f"{missing[0]} is missing; a row needs {wanted}")
    try:
        triplet = Triplet(
            id=row_id,
            prompt=value["prompt"],
            response_a=_response(value[names[0]]),
            response_b=_response(value[names[1]]),
        )
    except ValidationError as error:
        return _rejected(number, row_id, _reason(error))
    problem = text_problem(
        triplet.prompt, response_a=triplet.response_a, response_b=triplet.response_b
    )
    if problem is not None:
        return RejectedRow(number, row_id, problem)
    return NumberedTriplet(number, triplet)


def extra_columns(rows: Iterable[NumberedTriplet | RejectedRow]) -> list[Column]:
    """The columns beside the triplets of a whole input, each with its type."""
    learned = columns.Columns()
    for row in rows:
        if isinstance(row, NumberedTriplet):
            learned.learn(row.extra)
    return learned.known()


class RowWriter(Protocol):
    """Writes rows of the weighted dataset in one format."""

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows."""


def weighted_row(
    triplet: Triplet, annotation: Annotation, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One row of the weighted dataset, what stood beside its triplet last.

    chosen is the preferred response (response_a for a tie). Chat prompts give chat responses, so
    that TRL reads either kind as it is.
    """
    a_first = annotation.preferred != "b"
    chosen, rejected = triplet.response_a, triplet.response_b
    score_chosen, score_rejected = annotation.score_a, annotation.score_b
    if not a_first:
        chosen, rejected = rejected, chosen
        score_chosen, score_rejected = score_rejected, score_chosen
    row: dict[str, Any] = {
        "id": annotation.id,
        "prompt": plain_prompt(triplet.prompt),
        "chosen": _like(triplet.prompt, chosen),
        "rejected": _like(triplet.prompt, rejected),
        "confidence": annotation.confidence,
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
        "preferred": annotation.preferred,
    }
    if annotation.calibrated_confidence is not None:
        row["calibrated_confidence"] = annotation.calibrated_confidence
    return {**row, **extra} if extra else row


def plain_prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt as it stands in files: text, or messages as JSON objects."""
    if isinstance(prompt, str):
        return prompt
    return [message.model_dump() for message in prompt]


def weighted_schema(
    *,
    chat: bool,
    calibrated: bool,
    model: ModelRef | None = None,
    extra: Sequence[Column] = (),
) -> pa.Schema:
    """The Parquet schema of the weighted dataset; its metadata names the annotator."""
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    text = pa.list_(turn) if chat else pa.string()
    fields = [
        pa.field("id", pa.string(), nullable=False),
        *(pa.field(name, text, nullable=False) for name in ("prompt", "chosen", "rejected")),
        *(
            pa.field(name, pa.float32(), nullable=False)
            for name in ("confidence", "score_chosen", "score_rejected")
        ),
        pa.field("preferred", pa.string(), nullable=False),
    ]
    if calibrated:
        fields.append(pa.field("calibrated_confidence", pa.float32(), nullable=False))
    fields += [column.field() for column in extra]
    metadata = {"cwpo.annotator": model.model_dump_json()} if model else None
    return pa.schema(fields, metadata=metadata)


def weighted_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """The rows as a table of the schema, built column by column: many times from_pylist's speed."""
    values = {
        field.name: columns.stored(field, [row.get(field.name) for row in rows]) for field in schema
    }
    return pa.Table.from_pydict(values, schema=schema)


class ParquetWriter:
    """Writes weighted rows as Parquet; the first rows decide whether it is chat and calibrated."""

    def __init__(
        self, sink: BinaryIO, model: ModelRef | None = None, extra: Sequence[Column] = ()
    ) -> None:
        self._sink = sink
        self._model = model
        self._extra = extra
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows as one row group."""
        if not rows:
            return
        self.write_table(weighted_table(rows, self._schema(rows[0])))

    def write_table(self, table: pa.Table) -> None:
        """Append a table that already has the schema."""
        if self._writer is None:
            schema = table.schema
            self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        """Write the footer; a file without rows is still a valid, empty dataset."""
        if self._writer is None:
            schema = weighted_schema(
                chat=False, calibrated=False, model=self._model, extra=self._extra
            )
            self._writer = pq.ParquetWriter(self._sink, schema)
        self._writer.close()

    def _schema(self, row: Mapping[str, Any]) -> pa.Schema:
        if self._writer is not None:
            return self._writer.schema
        return weighted_schema(
            chat=not isinstance(row["prompt"], str),
            calibrated="calibrated_confidence" in row,
            model=self._model,
            extra=self._extra,
        )


class JsonlWriter:
    """Writes rows as JSON lines."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows, a line each."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        # A lone surrogate (a rejected row's id may hold one) becomes its JSON escape.
        self._sink.write("".join(lines).encode(errors="backslashreplace"))

    def close(self) -> None:
        """Nothing is buffered."""


@contextmanager
def weighted_writer(
    sink: BinaryIO,
    format: ResultFormat,
    model: ModelRef | None = None,
    extra: Sequence[Column] = (),
) -> Iterator[RowWriter]:
    """A writer of the weighted dataset in `format`, closed when the block ends well."""
    writer = ParquetWriter(sink, model, extra) if format == "parquet" else JsonlWriter(sink)
    yield writer
    writer.close()


def _parquet_rows(source: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    number = 0
    try:
        with pq.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for row in columns.with_text(batch).to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise DatasetError(f"not a readable Parquet file after row {number}: {error}") from error


def _json_rows(lines: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, dict[str, Any] | str]]:
    number = 0
    try:
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                yield number, f"the line is longer than {MAX_LINE_BYTES:,} bytes"
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE_BYTES)
            elif not line.isspace():
                yield number, _json_object(line)
    except _GZIP_ERRORS as error:
        raise DatasetError(f"the gzip data breaks off after line {number}: {error}") from error


def _json_object(line: bytes) -> dict[str, Any] | str:
    try:
        value = _parsed(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "not JSON that can be read: nested too deeply"
    except ValueError:  # The others are kinds of it; Python stops at 4,300 digits.
        return "not JSON that can be read: a number of too many digits"
    return value if isinstance(value, dict) else f"a JSON object is wanted, not {_kind(value)}"


def _parsed(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        # Four times slower, it reads halves of surrogate pairs too, and knows what is wrong where.
        return json.loads(line)


def _kind(value: object) -> Literal["null", "an array", "a string", "a number", "a boolean"]:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, list):
        return "an array"
    return "a string" if isinstance(value, str) else "a number"


def _with_extra(row: NumberedTriplet, value: dict[str, Any]) -> NumberedTriplet | RejectedRow:
    try:
        extra = columns.beside(value)
    except UnicodeEncodeError:
        detail = "a column beside the triplet holds half of a surrogate pair: no Unicode"
        return RejectedRow(row.row, row.triplet.id, ItemError(code="invalid_text", detail=detail))
    except DatasetError as error:
        raise DatasetError(f"row {row.row}: {error}") from error
    return replace(row, extra=extra) if extra else row


def _response(value: Any) -> Any:
    """The text of a response; TRL's conversational one is a list with one assistant message."""
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and value[0].get("role") == "assistant"
    ):
        return value[0].get("content")
    return value


def _reason(error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # A prompt is text or messages: the deepest error is of the kind that was meant.
    deepest = max(errors, key=lambda item: len(item["loc"]))
    place = [str(part) for part in deepest["loc"] if "[" not in str(part) and part != "str"]
    return f"{'.'.join(place)}: {deepest['msg']}"


def _rejected(number: int, row_id: str | None, detail: str) -> RejectedRow:
    return RejectedRow(number, row_id, ItemError(code="invalid_row", detail=detail))


def _like(prompt: Prompt, response: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return response
    return [Message(role="assistant", content=response).model_dump()]
