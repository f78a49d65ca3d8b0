"""The requests in which a long input is sent, decided without a socket.

An input is read in windows, each window is sent by prompt in requests of limited size, and what a
service still finds too large is sent in halves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Generic, TypeVar

from pydantic_core import PydanticSerializationError

from cwpo.datasets.naming import LISTS, SINGLES, TRIPLETS, Form, named
from cwpo.datasets.records import Rows, records
from cwpo.datasets.triplets import RejectedRow, parse_item, parse_score_item, parse_triplet
from cwpo.errors import CwpoError, DatasetError, TooLargeError, first_line
from cwpo.texts import prompt_order
from cwpo.transport import Call
from cwpo.types import (
    AnnotateResponse,
    EmbedResponse,
    FailedAnnotation,
    FailedScore,
    ItemError,
    ModelInfo,
    Priority,
    Prompt,
    RankItem,
    RankResponse,
    ScoreItem,
    ScoreResponse,
    Triplet,
    Truncation,
    Usage,
)

A = TypeVar("A", AnnotateResponse, ScoreResponse, RankResponse, EmbedResponse)
Label = Any

# What is read before the first of it is sent, and so what memory an endless input takes.
_WINDOW_ROWS = 8192
_WINDOW_BYTES = 64 << 20
# The same where labels are wanted as soon as there are some.
STREAMED_ROWS = 2048
# An input of one request of so many bytes is sent without asking for the limits of the service.
_UNASKED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input, as it is sent.

    place: its position in the input, from 0.
    content: its JSON.
    size: the number of its items, by which requests are limited; responses, where it is ranked.
    problem: why it is not sent; None if it is.
    """

    place: int
    id: str
    prompt: Prompt = ""
    content: bytes = b""
    size: int = 1
    problem: ItemError | None = None


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[A]):
    """A path that takes a list of rows and answers with a list of labels.

    sent, answered: names of the two lists.
    forms: the columns of a row that is a dictionary.
    parse: reads a row that is a dictionary, of the given position.
    of_triplet: number of items that take the place of a triplet in the limits.
    """

    path: str
    sent: str
    answered: str
    answer: type[A]
    item: type[Triplet] | type[ScoreItem] | type[RankItem]
    forms: Sequence[Form]
    parse: Callable[[int, Mapping[str, Any]], Triplet | ScoreItem | RankItem | RejectedRow]
    of_triplet: int = 1


@dataclass(frozen=True, slots=True)
class Question(Generic[A]):
    """What is asked about rows, the same for all of them.

    revision: that of the annotator that has to answer; None for any.
    """

    endpoint: Endpoint[A]
    truncation: Truncation
    priority: Priority
    revision: str | None

    @property
    def name(self) -> str:
        """What is done with the rows."""
        return self.endpoint.path.removeprefix("/")

    @property
    def body(self) -> tuple[bytes, bytes]:
        """What stands before and behind the rows in a request; defaults are not sent."""
        settings = b""
        if self.truncation != "error":
            settings += f',"truncation":"{self.truncation}"'.encode()
        if self.priority != "interactive":
            settings += f',"priority":"{self.priority}"'.encode()
        return f'{{"{self.endpoint.sent}":['.encode(), b"]" + settings + b"}"

    def call(self, rows: Sequence[Row], revision: str | None) -> Call[A]:
        """The request for these rows."""
        begin, end = self.body
        content = begin + b",".join(row.content for row in rows) + end
        # By this header a service that hosts another revision refuses the request.
        headers = {} if revision is None else {"X-Model-Revision": revision}
        endpoint = self.endpoint
        return Call("POST", endpoint.path, endpoint.answer, body=content, headers=headers)


def sent_rows(
    endpoint: Endpoint[A], given: Rows, columns: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """The rows, those without an id named by their position in the whole input.

    Args:
        columns: as of `naming.named`.
    Raises: DatasetError for what has no rows, or rows without the columns that are needed;
        ConfigError for a name in `columns` that nothing needs.
    """
    for place, record in named(enumerate(records(given)), endpoint.forms, columns):
        item = endpoint.parse(place, record) if isinstance(record, Mapping) else record
        if isinstance(item, RejectedRow):
            yield Row(place, item.id or str(place), problem=item.error)
        elif isinstance(item, endpoint.item):
            yield _row(place, item)
        else:
            raise DatasetError(
                f"row {place} is a {type(item).__name__}: rows are dictionaries or "
                f"{endpoint.item.__name__} objects"
            )


def _row(place: int, item: Triplet | ScoreItem | RankItem) -> Row:
    if not isinstance(item, ScoreItem) and item.id is None:
        item = item.model_copy(update={"id": str(place)})
    row_id = str(place) if isinstance(item, ScoreItem) else item.id or ""
    try:
        # Without defaults: an older service refuses the fields that it does not know.
        content = item.model_dump_json(exclude_defaults=True).encode()
    except PydanticSerializationError as error:
        problem = ItemError(code="invalid_text", detail=first_line(error))
        return Row(place, row_id, problem=problem)
    size = len(item.responses) if isinstance(item, RankItem) else 1
    return Row(place, row_id, item.prompt, content, size)


def _triplet(place: int, record: Mapping[str, Any]) -> Triplet | RejectedRow:
    row = parse_triplet(place, record)
    return row if isinstance(row, RejectedRow) else row.triplet


def _rank_item(place: int, record: Mapping[str, Any]) -> RankItem | RejectedRow:
    row = parse_item(place, record)
    return row if isinstance(row, RejectedRow) else row.item


ANNOTATE = Endpoint(
    "/annotate", "triplets", "annotations", AnnotateResponse, Triplet, TRIPLETS, _triplet
)
EMBED = Endpoint("/embed", "triplets", "embeddings", EmbedResponse, Triplet, TRIPLETS, _triplet)
SCORE = Endpoint("/score", "items", "scores", ScoreResponse, ScoreItem, SINGLES, parse_score_item)
RANK = Endpoint("/rank", "items", "rankings", RankResponse, RankItem, LISTS, _rank_item, 2)


class Exchange(Generic[A]):
    """The labels of some rows, by one request or, if it is too large, by several.

    While there is a `call()`, send it, and `receive` its answer, or, if it is refused as too large,
    have it `halve`.
    """

    def __init__(self, question: Question[A], rows: Sequence[Row]) -> None:
        self.endpoint: Endpoint[A] = question.endpoint
        self._question: Question[A] = question
        self._revision = question.revision
        sent = [row for row in rows if row.problem is None]
        self._waiting = deque([sent] if sent else [])
        self.labels: dict[int, Label] = {
            row.place: _failed(self.endpoint, row, row.problem) for row in rows if row.problem
        }
        self.answers: list[A] = []
        self.refusal: TooLargeError | None = None

    def call(self) -> Call[A] | None:
        """The next request; None when all rows have a label."""
        return self._question.call(self._waiting[0], self._revision) if self._waiting else None

    def receive(self, answer: A) -> None:
        """Take the answer to the call.

        Raises: CwpoError for an answer about other rows, or of another revision than was asked for,
        from a service that ignores the header.
        """
        rows = self._waiting.popleft()
        labels = getattr(answer, self.endpoint.answered)
        if len(labels) != len(rows):
            raise CwpoError(f"the service answered {len(rows)} rows with {len(labels)} labels")
        self._revision = self._revision or answer.model.revision
        if answer.model.revision != self._revision:
            raise CwpoError(
                f"the service answered with revision {answer.model.revision} of its annotator, "
                f"where {self._revision} was asked for: it is of version 0.2 or earlier, or a "
                "proxy removes the header X-Model-Revision"
            )
        self.labels |= zip([row.place for row in rows], labels, strict=True)
        self.answers.append(answer)

    def halve(self, refusal: TooLargeError) -> None:
        """Ask for the rows of the call in two halves; a row that is too large alone is an error."""
        rows = self._waiting.popleft()
        if len(rows) == 1:
            self.refusal = refusal
            error = ItemError(code="too_large", detail=refusal.problem.detail)
            self.labels[rows[0].place] = _failed(self.endpoint, rows[0], error)
            return
        middle = len(rows) // 2
        self._waiting.extendleft([rows[middle:], rows[:middle]])


@dataclass(slots=True)
class Batches(Generic[A]):
    """The exchanges for an input of any length, which is read as they are taken.

    Args:
        rows: the input.
        most: number of items (responses, where they are ranked) of a request.
        window: number of rows that are read before the first of them are sent.
    Raises: CwpoError for an input without rows.
    """

    question: Question[A]
    rows: Iterable[Row]
    most: int
    window: int = _WINDOW_ROWS
    _first: Sequence[Row] = field(init=False)
    _others: Iterator[Sequence[Row]] = field(init=False)

    def __post_init__(self) -> None:
        self._others = _windows(self.rows, self.window)
        self._first = next(self._others, [])
        if not self._first:
            raise CwpoError(
                f"there is nothing to send to {self.question.endpoint.path}: there are no rows"
            )

    @property
    def is_long(self) -> bool:
        """Whether the input may take several requests; then `exchanges` wants to know the model."""
        items = sum(row.size for row in self._first)
        size = sum(len(row.content) for row in self._first)
        if len(self._first) >= self.window or size >= _WINDOW_BYTES:
            return True  # Others may follow.
        return len(self._first) > 1 and (items > self.most or size > _UNASKED_BYTES)

    def exchanges(self, model: ModelInfo | None) -> Iterator[Exchange[A]]:
        """Those for all rows; the rows of a prompt are together, as far as a window has them.

        The annotator reads a prompt once for all rows of a request that have it.

        Args:
            model: what the service hosts, which has to answer unless the question names another
                revision; None for an input that is not long.
        """
        if model is None:
            yield Exchange(self.question, self._first)
            return
        question = replace(self.question, revision=self.question.revision or model.revision)
        most = min(self.most, model.max_triplets * question.endpoint.of_triplet)
        room = model.max_body_bytes - sum(map(len, question.body))
        for window in chain([self._first], self._others):
            order = prompt_order([row.prompt for row in window])
            for rows in _fitting([window[at] for at in order], most, room):
                yield Exchange(question, rows)


def joined(exchanges: Sequence[Exchange[A]]) -> A:
    """One answer out of all of them, with the labels in the order of the input.

    Raises: TooLargeError if each row is too large for a request; DatasetError if none is a valid
    one.
    """
    answers = [answer for exchange in exchanges for answer in exchange.answers]
    labels: dict[int, Label] = {}
    for exchange in exchanges:
        labels |= exchange.labels
    if not answers:
        refusals = [exchange.refusal for exchange in exchanges if exchange.refusal is not None]
        if refusals:
            raise refusals[0]
        raise DatasetError(f"none of {len(labels)} rows is valid; row 0: {labels[0].error.detail}")
    usage = Usage(
        triplets=sum(answer.usage.triplets for answer in answers),
        tokens=sum(answer.usage.tokens for answer in answers),
    )
    answered = exchanges[0].endpoint.answered
    in_order = [labels[place] for place in range(len(labels))]
    return answers[0].model_copy(update={answered: in_order, "usage": usage})


class InOrder:
    """Labels that come in any order, in that of the input."""

    def __init__(self) -> None:
        self._waiting: dict[int, Label] = {}
        self._next = 0

    def add(self, labels: Mapping[int, Label]) -> Iterator[Label]:
        """Take some labels by their places; yields those whose turn has come."""
        self._waiting |= labels
        while self._next in self._waiting:
            yield self._waiting.pop(self._next)
            self._next += 1


def _failed(endpoint: Endpoint[A], row: Row, error: ItemError) -> FailedAnnotation | FailedScore:
    """What stands in the answer for a row without a label."""
    if endpoint.answer is ScoreResponse:
        return FailedScore(error=error)
    return FailedAnnotation(id=row.id, error=error)


def _windows(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    """The rows that are read at a time. One that is not full is the last one."""
    window: list[Row] = []
    size = 0
    for row in rows:
        window.append(row)
        size += len(row.content)
        if len(window) >= most or size >= _WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _fitting(rows: Sequence[Row], most: int, room: int) -> Iterator[Sequence[Row]]:
    """The rows of each request: at most so many items and bytes, or one row."""
    start = items = size = 0
    for at, row in enumerate(rows):
        # And the comma before it.
        length = len(row.content) + 1
        if at > start and (items + row.size > most or size + length > room):
            yield rows[start:at]
            start, items, size = at, 0, 0
        items += row.size
        size += length
    yield rows[start:]
