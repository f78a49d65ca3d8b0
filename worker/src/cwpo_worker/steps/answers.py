"""The service's answers about the rows of a shard, and the errors of rows that it refuses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from cwpo import Client
from cwpo.datasets.triplets import NumberedTriplet
from cwpo.errors import APIError, CwpoError, InvalidRequestError, TooLargeError
from cwpo.types import Annotation, FailedAnnotation, ItemError, ModelRef, Truncation
from cwpo_worker.errors import OtherModelError, PoisonedShardError
from cwpo_worker.jobs.attempts import Attempts

REQUEST_ROWS = 512
IN_FLIGHT = 2
CAUTIOUS_ROWS = 16
# With more than these in a shard, it is the service that fails and not the rows.
POISON_ROWS = 16
# Workers that have to die of a row that was asked alone; one could have been killed by chance.
DEATHS = 2

Label = Annotation | FailedAnnotation


@dataclass(frozen=True, slots=True)
class Answer:
    """The labels of one request's rows; model is None if the service refused all of them."""

    rows: Sequence[NumberedTriplet]
    labels: Sequence[Label]
    model: ModelRef | None


def answers_to(
    client: Client,
    rows: Sequence[NumberedTriplet],
    truncation: Truncation,
    pin: Callable[[], str | None],
) -> Iterator[Answer]:
    """The answer to each request, in order, with some requests in flight at a time.

    Args:
        pin: called before each request; returns the revision of the annotator that has to answer
            it, None for any; raises JobStoppedError when the job was stopped.
    """
    pending: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for request in _requests(rows):
            if len(pending) == IN_FLIGHT:
                yield pending.popleft().result()
            pending.append(pool.submit(_ask, client, request, truncation, pin()))
        while pending:
            yield pending.popleft().result()


def cautious_answers_to(
    client: Client,
    rows: Sequence[NumberedTriplet],
    truncation: Truncation,
    attempts: Attempts,
    pin: Callable[[], str | None],
) -> Iterator[Answer]:
    """The answers to small requests, one at a time, each recorded before it is sent.

    If a request was recorded before but never answered, its rows are sent one by one. A row on
    which workers died, or the service fails, becomes an error.
    """
    poisoned = 0
    for at in range(0, len(rows), CAUTIOUS_ROWS):
        stretch = rows[at : at + CAUTIOUS_ROWS]
        with attempts.attempt(f"{stretch[0].row}+{len(stretch)}") as deaths:
            for suspects in [stretch] if not deaths else [[row] for row in stretch]:
                answer = _ask_suspects(client, suspects, truncation, pin(), attempts)
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


def _requests(rows: Sequence[NumberedTriplet]) -> Iterator[Sequence[NumberedTriplet]]:
    """Requests of some hundred rows, which end between two prompts if one ends in their last half.

    The annotator reads a prompt once for all rows of a request that have it.
    """
    start = 0
    while start < len(rows):
        end = start + REQUEST_ROWS
        ends = (
            at
            for at in range(end, end - REQUEST_ROWS // 2, -1)
            if at >= len(rows) or rows[at].triplet.prompt != rows[at - 1].triplet.prompt
        )
        stop = next(ends, end)
        yield rows[start:stop]
        start = stop


def _ask_suspects(
    client: Client,
    rows: Sequence[NumberedTriplet],
    truncation: Truncation,
    revision: str | None,
    attempts: Attempts,
) -> Answer:
    if len(rows) > 1:
        return _ask(client, rows, truncation, revision, is_cautious=True)
    name = str(rows[0].row)
    deaths = attempts.begin(name)
    if deaths >= DEATHS:
        return Answer(rows, [_poison(rows[0], f"{deaths} workers died of this row")], None)
    try:
        return _ask(client, rows, truncation, revision, is_cautious=True)
    finally:
        attempts.end(name)


def _ask(
    client: Client,
    rows: Sequence[NumberedTriplet],
    truncation: Truncation,
    revision: str | None,
    *,
    is_cautious: bool = False,
) -> Answer:
    """Send one request; if the service refuses it, send its halves, down to the row at fault.

    If is_cautious, do the same if the service fails.
    """
    try:
        answer = client.annotate(
            [row.triplet for row in rows],
            truncation=truncation,
            priority="batch",
            revision=revision,
            batch_size=len(rows),
        )
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
        if [label.id for label in answer.annotations] != [row.triplet.id for row in rows]:
            raise CwpoError("the service returned annotations of other rows than were sent")
        return Answer(rows, answer.annotations, answer.model)
    middle = len(rows) // 2
    first = _ask(client, rows[:middle], truncation, revision, is_cautious=is_cautious)
    if first.model is not None:
        revision = first.model.revision
    second = _ask(client, rows[middle:], truncation, revision, is_cautious=is_cautious)
    return Answer(rows, [*first.labels, *second.labels], first.model or second.model)


def _is_poison(label: Label) -> bool:
    return isinstance(label, FailedAnnotation) and label.error.code == "poison_row"


def _poison(row: NumberedTriplet, detail: str) -> FailedAnnotation:
    error = ItemError(code="poison_row", detail=detail)
    return FailedAnnotation(id=row.triplet.id or str(row.row), error=error)


def _refused(row: NumberedTriplet, error: APIError) -> FailedAnnotation:
    code: Literal["too_long", "invalid_row"] = (
        "too_long" if isinstance(error, TooLargeError) else "invalid_row"
    )
    return FailedAnnotation(
        id=row.triplet.id or str(row.row), error=ItemError(code=code, detail=error.problem.detail)
    )
