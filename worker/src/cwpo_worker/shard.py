"""Task 2: have the service annotate the rows of one shard, and keep the answers as a part."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import pyarrow as pa

from cwpo import Client
from cwpo.datasets import NumberedTriplet
from cwpo.errors import APIError, CwpoError, InvalidRequestError, TooLargeError
from cwpo.types import (
    Annotation,
    FailedAnnotation,
    ItemError,
    ModelRef,
    Truncation,
)
from cwpo_worker import activity, part
from cwpo_worker import rows as shard_rows
from cwpo_worker.errors import (
    IllegalTransitionError,
    ModelChangedError,
    PoisonedShardError,
    StoreError,
)
from cwpo_worker.job import now
from cwpo_worker.ledger import Ledger
from cwpo_worker.manifest import JobFolder, Manifest, Shard
from cwpo_worker.records import PartCounts
from cwpo_worker.trials import Trials

REQUEST_ROWS = 512
IN_FLIGHT = 2
# After so many failures that nobody can explain, the shard is done with caution.
PATIENCE = 2
CAUTIOUS_ROWS = 16
# Workers that have to die of a row that was asked alone; one could have been killed by chance.
DEATHS = 2
# With more than these in a shard, it is the service that fails and not the rows.
POISON_ROWS = 16

Label = Annotation | FailedAnnotation


@dataclass(frozen=True, slots=True)
class Answer:
    """The labels of one request's rows; no model where the service refused all of them."""

    rows: Sequence[NumberedTriplet]
    labels: Sequence[Label]
    model: ModelRef | None


def annotate(ledger: Ledger, client: Client, job_id: str, index: int) -> None:
    """Annotate one shard; nothing to do if its part is there already.

    Raises: ModelChangedError when the service answers with another annotator than the job's first;
    APIError or ConnectionFailedError as the client does; JobStoppedError when the job was
    cancelled; StoreError.
    """
    record = ledger.records.expect(job_id, "queued", "running")
    if record.state == "queued":
        with suppress(IllegalTransitionError):
            ledger.records.move(job_id, "running", started_at=now())
    folder = JobFolder(job_id)
    manifest = folder.read_manifest(ledger.store)
    shard = manifest.shards[index]
    is_new = not ledger.store.exists(folder.part(index))
    if is_new:
        _try_part(ledger, client, folder, manifest, shard)
    done = part.read(ledger.store, folder.part(index))
    if is_new:
        activity.add(ledger.redis, "rows_annotated", done.annotated)
        activity.add(ledger.redis, "rows_failed", len(done.errors))
    ledger.finish_part(job_id, index, PartCounts(done.annotated, len(done.errors)))


def _try_part(
    ledger: Ledger, client: Client, folder: JobFolder, manifest: Manifest, shard: Shard
) -> None:
    """Write the part; with caution where that has failed or killed its worker before."""
    trials = Trials(ledger.redis, manifest.job_id, shard.index)
    is_cautious = trials.begin("shard") >= PATIENCE
    try:
        rows = _rows(ledger, folder, shard)
        numbered = shard_rows.numbered(rows)
        if is_cautious:
            answers = _cautious_answers(ledger, client, manifest, numbered, trials)
        else:
            answers = _answers(ledger, client, manifest, numbered)
        _write_part(ledger, folder, manifest, shard, rows, answers)
    except Exception as error:
        if not (isinstance(error, APIError) and _is_failure(error)):
            trials.end("shard")
        raise
    trials.end("shard")


def _write_part(
    ledger: Ledger,
    folder: JobFolder,
    manifest: Manifest,
    shard: Shard,
    rows: pa.Table,
    answers: Iterator[Answer],
) -> None:
    labels: list[Label] = []
    model: ModelRef | None = None
    for answer in answers:
        if answer.model is not None:
            model = model or ledger.records.pin_model(manifest.job_id, answer.model)
            _check_model(model, answer.model)
        labels += answer.labels
    part.write(ledger.store, folder.part(shard.index), rows, labels, model, extra=manifest.columns)


def _rows(ledger: Ledger, folder: JobFolder, shard: Shard) -> pa.Table:
    key = folder.shard(shard.index)
    rows = shard_rows.read(ledger.store.read(key))
    if len(rows) != shard.rows:
        raise StoreError(f"{key} has {len(rows):,} rows where the manifest says {shard.rows:,}")
    return rows


def _answers(
    ledger: Ledger, client: Client, manifest: Manifest, rows: Sequence[NumberedTriplet]
) -> Iterator[Answer]:
    """The answer to each request, in order, with some requests in flight at a time."""
    pending: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for at in range(0, len(rows), REQUEST_ROWS):
            if len(pending) == IN_FLIGHT:
                yield pending.popleft().result()
            ledger.records.expect(manifest.job_id, "running")
            request = rows[at : at + REQUEST_ROWS]
            pending.append(pool.submit(_ask, client, request, manifest.truncation))
        while pending:
            yield pending.popleft().result()


def _cautious_answers(
    ledger: Ledger,
    client: Client,
    manifest: Manifest,
    rows: Sequence[NumberedTriplet],
    trials: Trials,
) -> Iterator[Answer]:
    """The answers to small requests, one at a time, each noted before it is sent.

    Where a request was noted and no answer, its rows are asked one by one. A row of which workers
    died, or on which the service fails, is an error.
    """
    poisoned = 0
    for at in range(0, len(rows), CAUTIOUS_ROWS):
        stretch = rows[at : at + CAUTIOUS_ROWS]
        with trials.trial(f"{stretch[0].row}+{len(stretch)}") as deaths:
            for suspects in [stretch] if not deaths else [[row] for row in stretch]:
                ledger.records.expect(manifest.job_id, "running")
                answer = _ask_suspects(client, suspects, manifest.truncation, trials)
                poisoned += sum(_is_poison(label) for label in answer.labels)
                if poisoned > POISON_ROWS:
                    raise PoisonedShardError(
                        f"the service fails on more than {POISON_ROWS} rows of one shard; its log "
                        f"says why; one of them is row {suspects[-1].row}"
                    )
                yield answer


def _ask_suspects(
    client: Client, rows: Sequence[NumberedTriplet], truncation: Truncation, trials: Trials
) -> Answer:
    if len(rows) > 1:
        return _ask(client, rows, truncation, is_cautious=True)
    name = str(rows[0].row)
    deaths = trials.begin(name)
    if deaths >= DEATHS:
        return Answer(rows, [_poison(rows[0], f"{deaths} workers died of this row")], None)
    try:
        return _ask(client, rows, truncation, is_cautious=True)
    finally:
        trials.end(name)


def _ask(
    client: Client,
    rows: Sequence[NumberedTriplet],
    truncation: Truncation,
    *,
    is_cautious: bool = False,
) -> Answer:
    """One request; where the service refuses it whole, its halves, down to the row at fault.

    With caution, so too where the service fails.
    """
    try:
        answer = client.annotate(
            [row.triplet for row in rows],
            truncation=truncation,
            priority="batch",
            batch_size=len(rows),
        )
    except APIError as error:
        is_refusal = isinstance(error, TooLargeError | InvalidRequestError)
        if not is_refusal and not (is_cautious and _is_failure(error)):
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
            raise CwpoError("the service answered other rows than it was asked about")
        return Answer(rows, answer.annotations, answer.model)
    middle = len(rows) // 2
    first = _ask(client, rows[:middle], truncation, is_cautious=is_cautious)
    second = _ask(client, rows[middle:], truncation, is_cautious=is_cautious)
    if first.model is not None and second.model is not None:
        _check_model(first.model, second.model)
    return Answer(rows, [*first.labels, *second.labels], first.model or second.model)


def _is_failure(error: APIError) -> bool:
    return error.status == HTTPStatus.INTERNAL_SERVER_ERROR


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


def _check_model(pinned: ModelRef, answered_by: ModelRef) -> None:
    if answered_by.revision != pinned.revision:
        raise ModelChangedError(
            f"the service changed its annotator from {pinned.name} {pinned.revision} to "
            f"{answered_by.name} {answered_by.revision} during the job: submit it again"
        )
