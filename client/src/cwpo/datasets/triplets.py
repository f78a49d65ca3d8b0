"""Reading triplets, and lists of responses, from JSON lines or Parquet in constant memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from pydantic_core import from_json

from cwpo import columns, json_values
from cwpo.columns import Column
from cwpo.datasets import parquet
from cwpo.errors import DatasetError, first_line, mistake_in
from cwpo.texts import prompt_order, responses_problem, text_problem
from cwpo.types import (
    FileFormat,
    ItemError,
    Prompt,
    RankItem,
    ScoreItem,
    Triplet,
)

MAX_LINE_BYTES = 64 << 20
MAX_ROW_VALUES = 100_000
_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def file_format(path: Path) -> FileFormat:
    """The format of a file, by its suffix. Raises: DatasetError for an unknown suffix."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if name.endswith((".jsonl.gz", ".ndjson.gz")):
        return "jsonl.gz"
    if name.endswith(".parquet"):
        return "parquet"
    raise DatasetError(f"{path}: not a .jsonl, .jsonl.gz or .parquet file")


def readable(path: Path) -> Path:
    """The same path. Raises: DatasetError if it is not a file."""
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    return path


def is_triplet_file(name: str) -> bool:
    """Whether the suffix of a file's name is that of a known format."""
    return name.lower().endswith(_SUFFIXES)


def triplet_files(path: Path) -> list[Path]:
    """The file, or the files of a known format in the folder, by name.

    Raises: DatasetError if there is no such file.
    """
    if not path.is_dir():
        return [readable(path)]
    files = sorted(file for file in path.iterdir() if is_triplet_file(file.name))
    if not files:
        raise DatasetError(f"{path}: holds no .jsonl, .jsonl.gz or .parquet file")
    return files


@dataclass(frozen=True, slots=True)
class NumberedTriplet:
    """A triplet with an id, the number of its line or row (from 1), and its extra columns."""

    row: int
    triplet: Triplet
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id of the triplet, which the reader has made sure of."""
        return self.triplet.id or str(self.row)

    @property
    def prompt(self) -> Prompt:
        """The prompt of the triplet."""
        return self.triplet.prompt


@dataclass(frozen=True, slots=True)
class NumberedItem:
    """A prompt with a list of responses; otherwise as a NumberedTriplet."""

    row: int
    item: RankItem
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id of the item, which the reader has made sure of."""
        return self.item.id or str(self.row)

    @property
    def prompt(self) -> Prompt:
        """The prompt of the item."""
        return self.item.prompt


NumberedRow = NumberedTriplet | NumberedItem
R = TypeVar("R", bound=NumberedRow)


def asking_order(rows: Sequence[NumberedRow]) -> list[int]:
    """The places of the rows in the order in which to ask: by prompt, lists after triplets.

    The annotator reads a prompt once for all rows of a request that have it, and a request has rows
    of one kind.
    """
    order = prompt_order([row.prompt for row in rows])
    return sorted(order, key=lambda at: isinstance(rows[at], NumberedItem))


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
    """The number (from 1) and the object of each row, or the reason why it is not an object.

    Blank lines are skipped, but count in the numbers.
    Raises: DatasetError if the whole file cannot be read (not Parquet, truncated gzip).
    """
    if format == "parquet":
        yield from _parquet_rows(source)
        return
    with _uncompressed(source, format) as stream:
        for number, line in _json_lines(stream):
            yield number, _too_large(line) or _json_object(line)


def rows_through(
    files: Iterable[Iterable[tuple[int, dict[str, Any] | str]]],
    before: int = 0,
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The rows of several files as those of one: the numbers continue from file to file.

    Args:
        before: number of the last row before the first file.
    """
    for rows in files:
        number = 0
        for number, row in rows:
            yield before + number, row
        before += number


def count_rows(source: BinaryIO, format: FileFormat) -> int:
    """The number of rows that read_rows gives, without parsing them.

    Raises: DatasetError as read_rows does.
    """
    if format == "parquet":
        try:
            return int(pq.read_metadata(source).num_rows)
        except (pa.ArrowException, OSError) as error:
            raise _not_parquet(error) from error
    with _uncompressed(source, format) as stream:
        return sum(1 for _ in _json_lines(stream))


def read_triplets(source: BinaryIO, format: FileFormat) -> Iterator[NumberedTriplet | RejectedRow]:
    """Each row of a file as a triplet, or as a rejected row with the reason, in input order.

    Raises: DatasetError as read_rows does, and as triplets_of does.
    """
    return triplets_of(read_rows(source, format))


def triplets_of(
    rows: Iterable[tuple[int, dict[str, Any] | str]],
    is_chat: bool | None = None,
) -> Iterator[NumberedTriplet | RejectedRow]:
    """Each numbered row as a triplet, or as a rejected row with the reason.

    Responses are the columns response_a and response_b, or TRL's chosen and rejected (then a is
    chosen). A missing id becomes the row's number; a number as id becomes text. The first valid
    row decides whether all prompts have to be texts or chat messages.

    Args:
        is_chat: whether prompts have to be chat messages, where rows before these have decided it.
    Raises: DatasetError for an extra column that cannot be kept.
    """
    return _parsed_rows(rows, is_chat, _parse_only_triplet)


def rows_of_responses(
    rows: Iterable[tuple[int, dict[str, Any] | str]],
    is_chat: bool | None = None,
) -> Iterator[NumberedRow | RejectedRow]:
    """As `triplets_of`, where a row may also have a list, `responses`, in place of two responses.

    A row with two responses is a triplet, whatever its column `responses` holds.
    """
    return _parsed_rows(rows, is_chat, _parse_row)


def _parsed_rows(
    rows: Iterable[tuple[int, dict[str, Any] | str]],
    is_chat: bool | None,
    parse: Callable[[int, dict[str, Any] | str], R | RejectedRow],
) -> Iterator[R | RejectedRow]:
    for number, value in rows:
        row = parse(number, value)
        if not isinstance(row, RejectedRow) and isinstance(value, dict):
            row = _with_extra(row, value)
        if not isinstance(row, RejectedRow):
            chat = not isinstance(row.prompt, str)
            is_chat = chat if is_chat is None else is_chat
            if chat != is_chat:
                kinds = ("chat messages", "text") if chat else ("text", "chat messages")
                row = _rejected(
                    number,
                    row.id,
                    f"prompt is {kinds[0]}, but the prompts of earlier rows are {kinds[1]}: "
                    "split the file in two",
                )
        yield row


def parse_triplet(number: int, value: Mapping[str, Any] | str) -> NumberedTriplet | RejectedRow:
    """One row of read_rows as a triplet, or as a rejected row with the reason."""
    if isinstance(value, str):
        return _rejected(number, None, value)
    row_id = id_of(number, value)
    names = ("response_a", "response_b") if "response_a" in value else ("chosen", "rejected")
    prompt, response_a, response_b = map(value.get, ("prompt", *names))
    if prompt is None or response_a is None or response_b is None:
        missing = next(name for name in ("prompt", *names) if value.get(name) is None)
        wanted = "prompt, response_a and response_b (or prompt, chosen and rejected)"
        return _rejected(number, row_id, f"{missing} is missing; a row needs {wanted}")
    try:
        triplet = Triplet(
            id=row_id,
            prompt=prompt,
            response_a=_response(response_a),
            response_b=_response(response_b),
        )
    except ValidationError as error:
        return _rejected(number, row_id, mistake_in(error))
    problem = text_problem(
        triplet.prompt, response_a=triplet.response_a, response_b=triplet.response_b
    )
    if problem is not None:
        return RejectedRow(number, row_id, problem)
    return NumberedTriplet(number, triplet)


def parse_score_item(number: int, value: Mapping[str, Any]) -> ScoreItem | RejectedRow:
    """One row with a single response, or a rejected row with the reason."""
    row_id = id_of(number, value)
    prompt, response = value.get("prompt"), value.get("response")
    if prompt is None or response is None:
        missing = "prompt" if prompt is None else "response"
        return _rejected(number, row_id, f"{missing} is missing; a row needs prompt and response")
    try:
        item = ScoreItem(prompt=prompt, response=_response(response))
    except ValidationError as error:
        return _rejected(number, row_id, mistake_in(error))
    problem = text_problem(item.prompt, response=item.response)
    return item if problem is None else RejectedRow(number, row_id, problem)


def _parse_only_triplet(number: int, value: dict[str, Any] | str) -> NumberedTriplet | RejectedRow:
    # Nearly no row has the name: to call for each would take longer than to look.
    if isinstance(value, dict) and "responses" in value and columns.lists_responses(value):
        return _rejected(
            number,
            id_of(number, value),
            "the row has a list of responses, and nothing says which pairs to make of them: name "
            "best_worst, adjacent or all with --pairs, or as pairs of POST /jobs",
        )
    return parse_triplet(number, value)


def _parse_row(number: int, value: dict[str, Any] | str) -> NumberedRow | RejectedRow:
    """One row of read_rows as a triplet or an item, or as a rejected row with the reason."""
    if not isinstance(value, dict) or not columns.lists_responses(value):
        return parse_triplet(number, value)
    return parse_item(number, value)


def parse_item(number: int, value: Mapping[str, Any]) -> NumberedItem | RejectedRow:
    """One row that has a list of responses as an item, or as a rejected row with the reason."""
    row_id = id_of(number, value)
    prompt, responses = value.get("prompt"), value.get("responses")
    if prompt is None or responses is None:
        missing = "prompt" if prompt is None else "responses"
        return _rejected(number, row_id, f"{missing} is missing; a row needs prompt and responses")
    if isinstance(responses, list):
        responses = list(map(_response, responses))
    try:
        item = RankItem(id=row_id, prompt=prompt, responses=responses)
    except ValidationError as error:
        return _rejected(number, row_id, mistake_in(error))
    problem = responses_problem(item.prompt, item.responses)
    return NumberedItem(number, item) if problem is None else RejectedRow(number, row_id, problem)


def id_of(number: int, value: Mapping[str, Any]) -> str:
    """The id of a row as text; that of a row without one is its number."""
    given = value.get("id")
    return str(number) if given is None else str(given)


def extra_columns(rows: Iterable[NumberedRow | RejectedRow]) -> list[Column]:
    """The extra columns of a whole input, each with its type."""
    learned = columns.Columns()
    for row in rows:
        if not isinstance(row, RejectedRow):
            learned.learn(row.extra)
    return learned.known()


def _parquet_rows(source: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    number = 0
    try:
        for number, row in enumerate(parquet.read_rows(source, MAX_LINE_BYTES), 1):
            yield number, row
    except MemoryError as error:
        raise DatasetError(
            f"the Parquet file needs more memory than there is after row {number} ({error}): write "
            "it anew with smaller pages and row groups"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(error, f" after row {number}") from error


def _not_parquet(error: Exception, where: str = "") -> DatasetError:
    """The error for a file with damaged content.

    Raises: the error itself if the file cannot be read at all: pyarrow raises OSError for damaged
        content too, but without a number.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return DatasetError(f"not a readable Parquet file{where}: {first_line(error)}")


def _uncompressed(
    source: BinaryIO, format: Literal["jsonl", "jsonl.gz"]
) -> AbstractContextManager[BinaryIO | gzip.GzipFile]:
    return gzip.open(source, "rb") if format == "jsonl.gz" else nullcontext(source)


def _json_lines(stream: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers; a line that is too long is truncated."""
    number = 0
    try:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            is_long = len(line) > MAX_LINE_BYTES
            if is_long or not line.isspace():
                yield number, line
            while is_long and line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
    except _GZIP_ERRORS as error:
        raise DatasetError(f"the gzip data ends too early, after line {number}: {error}") from error


def _too_large(line: bytes) -> str | None:
    """Why the line is too large to be parsed; None if it is not."""
    if len(line) > MAX_LINE_BYTES:
        return f"the line is longer than {MAX_LINE_BYTES:,} bytes"
    if json_values.exceeds(line, MAX_ROW_VALUES):
        return f"the line has more than {MAX_ROW_VALUES:,} JSON values"
    return None


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


def _with_extra(row: R, value: dict[str, Any]) -> R | RejectedRow:
    if not columns.has_extra(value):
        return row
    taken = columns.reserved_name(value)
    if taken is not None:
        return _rejected(
            row.row,
            row.id,
            f"the column name {taken!r} is reserved for the annotation: rename the column or leave "
            "it out",
        )
    try:
        extra = columns.extra_values(value)
    except UnicodeEncodeError:
        detail = "an extra column holds half of a surrogate pair: no Unicode"
        return RejectedRow(row.row, row.id, ItemError(code="invalid_text", detail=detail))
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


def by_reason(rejected: Counter[str]) -> str:
    """How many items were rejected for each reason: "2 invalid_row, 1 too_long"."""
    return ", ".join(f"{count:,} {code}" for code, count in rejected.most_common())


def _rejected(number: int, row_id: str | None, detail: str) -> RejectedRow:
    return RejectedRow(number, row_id, ItemError(code="invalid_row", detail=detail))
