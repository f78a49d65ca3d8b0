"""Task 1: cut the input into shards and put aside the rows that cannot be annotated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cwpo.columns import Columns
from cwpo.datasets import (
    JsonlWriter,
    NumberedTriplet,
    RejectedRow,
    file_format,
    read_triplets,
)
from cwpo.errors import DatasetError
from cwpo.types import FileFormat
from cwpo_worker.errors import IllegalTransitionError, JobStoppedError
from cwpo_worker.inputs import Input, sha256_of
from cwpo_worker.job import JobRecord
from cwpo_worker.ledger import Ledger
from cwpo_worker.manifest import JobFolder, Manifest, Shard
from cwpo_worker.queue import shard_tasks
from cwpo_worker.rows import ShardRows

# A shard of long texts is closed before its rows are too much for a worker's memory.
SHARD_CHARACTERS = 32 << 20
# Fewer rows say little about the share of bad ones.
JUDGED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """The input of a job, and what is known of it."""

    stream: BinaryIO
    format: FileFormat
    sha256: str


def plan(ledger: Ledger, job_id: str) -> None:
    """Write the shards and the manifest, and queue the shards.

    Raises: DatasetError when the input cannot be read as a whole, has no rows or too large a share
    of invalid ones; JobStoppedError when the job was cancelled; StoreError.
    """
    record = ledger.records.expect(job_id, "validating")
    folder = JobFolder(job_id)
    if ledger.store.exists(folder.manifest):
        manifest = folder.read_manifest(ledger.store)
    else:
        manifest = _cut(ledger, record, folder)
    if manifest.rows == 0:
        raise DatasetError("the input has no rows")
    _start(ledger, manifest)


def _cut(ledger: Ledger, record: JobRecord, folder: JobFolder) -> Manifest:
    rejected = 0
    shards: list[Shard] = []
    columns = Columns()
    with ledger.store.create(folder.rejected) as sink, _opened(ledger, record) as source:
        errors = JsonlWriter(sink)
        items = _bearable(read_triplets(source.stream, source.format), record.max_rejected_share)
        for item in _shards(ledger, record, items, columns):
            if isinstance(item, RejectedRow):
                errors.write([item.as_dict()])
                rejected += 1
            else:
                shards.append(item)
                ledger.records.expect(record.id, "validating")
    manifest = Manifest(
        job_id=record.id,
        input_sha256=source.sha256,
        truncation=record.truncation,
        rejected=rejected,
        columns=columns.known(),
        shards=shards,
    )
    with ledger.store.create(folder.manifest) as blob:
        blob.write(manifest.model_dump_json().encode())
    return manifest


@contextmanager
def _opened(ledger: Ledger, record: JobRecord) -> Iterator[Source]:
    if record.file_id is not None:
        file = ledger.files.get(record.file_id, owner=None)
        with ledger.files.open(file.id) as stream:
            yield Source(stream, file.format, file.sha256)
    else:
        url = record.input_url or ""
        with Input(url, record.input_version or "").open() as stream:
            yield Source(stream, file_format(Path(url)), sha256_of(stream))


def _bearable(
    items: Iterable[NumberedTriplet | RejectedRow], share: float
) -> Iterator[NumberedTriplet | RejectedRow]:
    """The same items. Raises: DatasetError once more than the share of them are rejected."""
    rejected = 0
    first: RejectedRow | None = None
    for seen, item in enumerate(items, 1):
        if isinstance(item, RejectedRow):
            rejected += 1
            first = first or item
        if first is not None and seen >= JUDGED_ROWS and rejected > share * seen:
            raise DatasetError(
                f"{rejected:,} of the first {seen:,} rows are invalid, a larger share than "
                f"max_rejected_share = {share:g} allows; the first is row {first.row}: "
                f"{first.error.detail}"
            )
        yield item


def _shards(
    ledger: Ledger,
    record: JobRecord,
    items: Iterable[NumberedTriplet | RejectedRow],
    columns: Columns,
) -> Iterator[Shard | RejectedRow]:
    """Each shard when it has been written, and the rejected rows in between; learns columns."""
    folder = JobFolder(record.id)
    index = 0
    rows = ShardRows()

    def written() -> Shard:
        with ledger.store.create(folder.shard(index)) as blob:
            rows.write(blob)
        numbers = rows.numbers
        return Shard(index=index, rows=len(numbers), first_row=numbers[0], last_row=numbers[-1])

    for item in items:
        if isinstance(item, RejectedRow):
            yield item
            continue
        if item.extra:
            columns.learn(item.extra)
        rows.add(item)
        if len(rows.numbers) == record.shard_rows or rows.characters >= SHARD_CHARACTERS:
            yield written()
            index, rows = index + 1, ShardRows()
    if rows.numbers:
        yield written()


def _start(ledger: Ledger, manifest: Manifest) -> None:
    record = ledger.records.expect(manifest.job_id, "validating")
    progress = record.progress.model_copy(update={"rows_total": manifest.rows})
    try:
        ledger.records.move(
            manifest.job_id,
            "queued",
            progress=progress,
            rejected=manifest.rejected,
            shards=len(manifest.shards),
        )
    except IllegalTransitionError as error:
        raise JobStoppedError(str(error)) from error
    ledger.queue.enqueue(
        shard_tasks(manifest.job_id, range(len(manifest.shards)), len(manifest.shards))
    )
    if not manifest.shards:
        ledger.finalize(manifest.job_id)
