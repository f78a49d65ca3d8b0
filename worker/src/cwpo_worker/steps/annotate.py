"""Task 2: have the service annotate the rows of a shard, and store the answers as a part."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from cwpo import Client
from cwpo.datasets.triplets import asking_order
from cwpo.errors import APIError
from cwpo.types import ModelRef
from cwpo_worker.jobs.finished_shards import RowCounts
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.manifest import Manifest
from cwpo_worker.jobs.record import JobRecord
from cwpo_worker.steps.answers import (
    Answer,
    Label,
    Question,
    answers_to,
    cautious_answers_to,
    check_model,
    is_failure,
)
from cwpo_worker.steps.part import read_row_counts, write_part
from cwpo_worker.steps.shard_rows import numbered_rows, read_shard
from cwpo_worker.storage.store import BlobStore

# After so many failures that nobody can explain, the shard is done with caution.
PATIENCE = 2


def annotate_shard(
    lifecycle: Lifecycle, store: BlobStore, client: Client, job_id: str, index: int
) -> None:
    """Annotate one shard, unless its part exists already.

    Raises: ModelRevisionError or OtherModelError while the service has another annotator than the
    job is pinned to; APIError or ConnectionFailedError as the client does; JobStoppedError when the
    job was cancelled or pinned anew; StoreError.
    """
    job = lifecycle.start_running(job_id)
    manifest = job.folder.read_manifest(store)
    if store.exists(job.folder.part(index)):
        counts = read_row_counts(store, job.folder.part(index))
    else:
        counts = _try_part(lifecycle, store, client, job, manifest, index)
        lifecycle.count_rows(counts)
    lifecycle.finish_shard(job, index, counts)


def _try_part(
    lifecycle: Lifecycle,
    store: BlobStore,
    client: Client,
    job: JobRecord,
    manifest: Manifest,
    index: int,
) -> RowCounts:
    """Write the part, cautiously if earlier attempts failed or their workers died."""
    if job.waiting is not None and job.model is not None:
        # Cheaper than rows that are refused: workers have other jobs to do meanwhile.
        check_model(job.model, client.model().ref())
    attempts = lifecycle.attempts(job.id, index)
    is_cautious = attempts.begin("shard") >= PATIENCE
    try:
        table = read_shard(store.read(job.folder.shard(index)))
        rows = numbered_rows(table)
        question = Question(client, manifest.truncation, job.pairs)
        pin = partial(_pin, lifecycle, job)
        if is_cautious:
            answers = cautious_answers_to(question, rows, attempts, pin)
            model, labels = _collected(lifecycle, job, answers)
        else:
            order = asking_order(rows)
            answers = answers_to(question, [rows[at] for at in order], pin)
            model, found = _collected(lifecycle, job, answers)
            of_row = dict(zip(order, found, strict=True))
            labels = [of_row[at] for at in range(len(rows))]
        key = job.folder.part(index)
        counts = write_part(
            store,
            key,
            table,
            labels,
            model,
            extra=manifest.columns,
            is_paired=job.pairs is not None,
            certificate=job.certificate,
        )
    except Exception as error:
        if not (isinstance(error, APIError) and is_failure(error)):
            attempts.end("shard")
        raise
    attempts.end("shard")
    return counts


def _pin(lifecycle: Lifecycle, job: JobRecord) -> str | None:
    """The revision that the job is pinned to by now. Raises: JobStoppedError if it was stopped."""
    model = lifecycle.current(job).model
    return None if model is None else model.revision


def _collected(
    lifecycle: Lifecycle, job: JobRecord, answers: Iterator[Answer]
) -> tuple[ModelRef | None, list[Label]]:
    """The labels of all answers, and the annotator that they came from."""
    labels: list[Label] = []
    model: ModelRef | None = None
    for answer in answers:
        if answer.model is not None:
            model = model or lifecycle.pin_model(job, answer.model)
            check_model(model, answer.model)
        labels += answer.labels
    return model, labels
