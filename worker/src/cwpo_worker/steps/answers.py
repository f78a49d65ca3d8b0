"""The service's answers about the rows of a shard, and the errors of rows that it refuses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from cwpo import Client
from cwpo.datasets.ranked import RankedPairs
from cwpo.datasets.triplets import NumberedItem, NumberedRow, NumberedTriplet
from cwpo.errors import APIError, CwpoError, InvalidRequestError, TooLargeError
from cwpo.types import (
    Annotation,
    FailedAnnotation,
    ItemError,
    ModelRef,
    Pairs,
    Ranking,
    Truncation,
)
from cwpo_worker.errors import OtherModelError, PoisonedShardError
from cwpo_worker.jobs.attempts import Attempts

REQUEST_ROWS = 512
IN_FLIGHT = 2
CAUTIOUS_ROWS = 16
# With more than these in a shard, it is the service that fails and not the rows.
POISON_ROWS = 16
# Workers that have to die of a row that was asked alone; one could have been killed by chance.
DEATHS = 2

Label = Annotation | RankedPairs | FailedAnnotation


@dataclass(frozen=True, slots=True)
class Question:
    """How rows are asked: by a client, with one treatment of what is too long.

    pairs: what pairs the rows with lists of responses give; None where there are no such rows.
    """

    client: Client
    truncation: Truncation
    pairs: Pairs | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The labels of one request's rows; model is None if the service refused all of them."""

    rows: Sequence[NumberedRow]
    labels: Sequence[Label]
    model: ModelRef | None


def answers_to(
    question: Question,
    rows: Sequence[NumberedRow],
    pin: Callable[[], str | None],
) -> Iterator[Answer]:
    """The answer to each request, in order, with some requests in flight at a time.

    Args:
        pin: called before each request; returns the revision of the annotator that has to answer
            it, None for any; raises JobStoppedError when the job was stopped.
    """
    pending: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for request in _requests(rows, REQUEST_ROWS):
            if len(pending) == IN_FLIGHT:
                yield pending.popleft().result()
            pending.append(pool.submit(_ask, question, request, pin()))
        while pending:
            yield pending.popleft().result()


def cautious_answers_to(
    question: Question,
    rows: Sequence[NumberedRow],
    attempts: Attempts,
    pin: Callable[[], str | None],
) -> Iterator[Answer]:
    """The answers to small requests, one at a time, each recorded before it is sent.

    If a request was recorded before but never answered, its rows are sent one by one. A row on
    which workers died, or the service fails, becomes an error.
    """
    poisoned = 0
    for stretch in _requests(rows, CAUTIOUS_ROWS):
        with attempts.attempt(f"{stretch[0].row}+{len(stretch)}") as deaths:
            for suspects in [stretch] if not deaths else [[row] for row in stretch]:
                answer = _ask_suspects(question, suspects, pin(), attempts)
                poisoned += sum(_is_poison(label) for label in answer.labels)
                if poisoned > POISON_ROWS:
                    raise PoisonedShardError(
                        f"the service fails on more than {POISON_ROWS} rows of one shard; its log "
                        f"says why; one of them is row {suspects[-1].row}"
                    )
                yield answer


def check_model(pinned: ModelRef, answered_by: ModelRef) -> None:
    """Raises: OtherModelError if the answer is not from the pinned annotator."""
    if answered_by.revision != pinned.revision:
        raise OtherModelError(
            f"annotator {answered_by.name} at revision {answered_by.revision} answered, and the "
            f"job is pinned to {pinned.name} at revision {pinned.revision}"
        )


def is_failure(error: APIError) -> bool:
    """Whether the service failed without saying why (status 500), perhaps because of a row."""
    return error.status == HTTPStatus.INTERNAL_SERVER_ERROR


def _requests(rows: Sequence[NumberedRow], size: int) -> Iterator[Sequence[NumberedRow]]:
    """The rows of each request: neighbours of one kind.

    A request ends between two prompts if one ends in its last half: the annotator reads a prompt
    once for all rows of a request that have it.

    Args:
        size: triplets of a request; lists have as many responses together as these, or are one
            list of more.
    """
    start = 0
    while start < len(rows):
        end = _end_of_request(rows, start, size)
        ends = (
            at
            for at in range(end, (start + end) // 2, -1)
            if at == len(rows) or not _share_prompt(rows[at - 1], rows[at])
        )
        stop = next(ends, end)
        yield rows[start:stop]
        start = stop


def _end_of_request(rows: Sequence[NumberedRow], start: int, size: int) -> int:
    """Where the rows from `start` on, at least one, are too many or of another kind."""
    room = 2 * size
    for at in range(start, len(rows)):
        row = rows[at]
        room -= len(row.item.responses) if isinstance(row, NumberedItem) else 2
        if at > start and (room < 0 or type(row) is not type(rows[start])):
            return at
    return len(rows)


def _share_prompt(row: NumberedRow, after: NumberedRow) -> bool:
    return type(row) is type(after) and row.prompt == after.prompt


def _ask_suspects(
    question: Question,
    rows: Sequence[NumberedRow],
    revision: str | None,
    attempts: Attempts,
) -> Answer:
    if len(rows) > 1:
        return _ask(question, rows, revision, is_cautious=True)
    name = str(rows[0].row)
    deaths = attempts.begin(name)
    if deaths >= DEATHS:
        return Answer(rows, [_poison(rows[0], f"{deaths} workers died of this row")], None)
    try:
        return _ask(question, rows, revision, is_cautious=True)
    finally:
        attempts.end(name)


def _ask(
    question: Question,
    rows: Sequence[NumberedRow],
    revision: str | None,
    *,
    is_cautious: bool = False,
) -> Answer:
    """Send one request; if the service refuses it, send its halves, down to the row at fault.

    If is_cautious, do the same if the service fails.
    """
    try:
        answer = _send(question, rows, revision)
    except APIError as error:
        is_refusal = isinstance(error, TooLargeError | InvalidRequestError)
        if not is_refusal and not (is_cautious and is_failure(error)):
            raise
        if len(rows) == 1:
            label = (
                _refused(rows[0], error)
                if is_refusal
                else _poison(rows[0], f"the service fails on this row: {error.problem.detail}")
            )
            return Answer(rows, [label], None)
    else:
        if [label.id for label in answer.labels] != [row.id for row in rows]:
            raise CwpoError("the service returned annotations of other rows than were sent")
        return answer
    middle = len(rows) // 2
    first = _ask(question, rows[:middle], revision, is_cautious=is_cautious)
    if first.model is not None:
        revision = first.model.revision
    second = _ask(question, rows[middle:], revision, is_cautious=is_cautious)
    return Answer(rows, [*first.labels, *second.labels], first.model or second.model)


def _send(question: Question, rows: Sequence[NumberedRow], revision: str | None) -> Answer:
    """Send one request for rows of one kind. Raises: as the client does."""
    items = [row.item for row in rows if isinstance(row, NumberedItem)]
    if not items or question.pairs is None:
        triplets = [row.triplet for row in rows if isinstance(row, NumberedTriplet)]
        annotated = question.client.annotate(
            triplets,
            truncation=question.truncation,
            priority="batch",
            revision=revision,
            batch_size=len(triplets),
        )
        return Answer(rows, annotated.annotations, annotated.model)
    ranked = question.client.rank(
        items,
        truncation=question.truncation,
        priority="batch",
        revision=revision,
        batch_size=sum(len(item.responses) for item in items),
    )
    labels = [
        RankedPairs.of(ranking, question.pairs, ranked.temperature)
        if isinstance(ranking, Ranking)
        else ranking
        for ranking in ranked.rankings
    ]
    return Answer(rows, labels, ranked.model)


def _is_poison(label: Label) -> bool:
    return isinstance(label, FailedAnnotation) and label.error.code == "poison_row"


def _poison(row: NumberedRow, detail: str) -> FailedAnnotation:
    error = ItemError(code="poison_row", detail=detail)
    return FailedAnnotation(id=row.id, error=error)


def _refused(row: NumberedRow, error: APIError) -> FailedAnnotation:
    code: Literal["too_large", "invalid_row"] = (
        "too_large" if isinstance(error, TooLargeError) else "invalid_row"
    )
    return FailedAnnotation(id=row.id, error=ItemError(code=code, detail=error.problem.detail))
