"""Task 1: split the input into shards, and set aside the rows that cannot be annotated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from cwpo.columns import Columns
from cwpo.datasets.triplets import (
    NumberedTriplet,
    RejectedRow,
    file_format,
    read_rows,
    rows_through,
    triplets_of,
)
from cwpo.datasets.weighted import JsonlWriter
from cwpo.errors import DatasetError
from cwpo.types import FileFormat
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.manifest import JobFolder, Manifest
from cwpo_worker.jobs.record import JobRecord
from cwpo_worker.jobs.shard_ranges import joined
from cwpo_worker.steps.shard_rows import ShardRows
from cwpo_worker.storage.inputs import INPUTS, Input, sha256_of
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import FileCatalog

# A shard of long texts is closed before its rows are too much for a worker's memory.
SHARD_CHARACTERS = 32 << 20
# Fewer rows say little about the share of bad ones.
JUDGED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """An input of a job, with its format and checksum; the name is for messages."""

    name: str
    stream: BinaryIO
    format: FileFormat
    sha256: str


def plan_job(lifecycle: Lifecycle, store: BlobStore, job_id: str) -> None:
    """Write the shards and the manifest, and queue the shards.

    Raises: DatasetError if the input cannot be read, has no rows or too large a share of invalid
    rows; JobStoppedError if the job was cancelled; StoreError.
    """
    record = lifecycle.expect(job_id, "validating")
    folder = JobFolder(job_id)
    if store.exists(folder.manifest):
        manifest = folder.read_manifest(store)
    else:
        manifest = _cut(lifecycle, store, record, folder)
    if manifest.rows == 0:
        raise DatasetError("the input has no rows")
    lifecycle.start_shards(manifest)


def _cut(lifecycle: Lifecycle, store: BlobStore, record: JobRecord, folder: JobFolder) -> Manifest:
    rejected = annotatable = shards = 0
    columns = Columns()
    checksums: list[str] = []
    with store.create(folder.rejected) as sink:
        errors = JsonlWriter(sink)
        rows = rows_through(_rows(source, checksums) for source in _sources(store, record))
        items = _within_rejected_share(triplets_of(rows), record.max_rejected_share)
        for item in _shards(store, record, items, columns):
            if isinstance(item, RejectedRow):
                errors.write([item.as_dict()])
                rejected += 1
            else:
                annotatable += item
                shards += 1
                lifecycle.expect(record.id, "validating")
    manifest = Manifest(
        job_id=record.id,
        input_sha256=_checksum(checksums),
        truncation=record.truncation,
        rows=annotatable + rejected,
        rejected=rejected,
        columns=columns.known(),
        shards=joined([(0, shards)]),
    )
    with store.create(folder.manifest) as blob:
        blob.write(manifest.model_dump_json().encode())
    return manifest


def _sources(store: BlobStore, record: JobRecord) -> Iterator[AbstractContextManager[Source]]:
    """The inputs in order, each to be opened when it is read."""
    for file_id in record.files:
        yield _upload(store, file_id)
    if record.input_url is not None:
        yield _input(Input(record.input_url, record.input_version or ""))
    if record.prefix is not None:
        yield from map(_input, INPUTS.validate_json(store.read(JobFolder(record.id).inputs)))


@contextmanager
def _upload(store: BlobStore, file_id: str) -> Iterator[Source]:
    files = FileCatalog(store)
    file = files.get(file_id, owner=None)
    with files.open(file_id) as stream:
        yield Source(file_id, stream, file.format, file.sha256)


@contextmanager
def _input(found: Input) -> Iterator[Source]:
    with found.open() as stream:
        yield Source(found.name, stream, file_format(Path(found.url)), sha256_of(stream))


def _rows(
    opening: AbstractContextManager[Source], checksums: list[str]
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with opening as source:
        checksums.append(source.sha256)
        try:
            yield from read_rows(source.stream, source.format)
        except DatasetError as error:
            raise DatasetError(f"{source.name}: {error}") from error


def _checksum(checksums: list[str]) -> str:
    """That of the input: of several files, the checksum of theirs, a line each."""
    return (
        checksums[0] if len(checksums) == 1 else sha256("\n".join(checksums).encode()).hexdigest()
    )


def _within_rejected_share(
    items: Iterable[NumberedTriplet | RejectedRow], share: float
) -> Iterator[NumberedTriplet | RejectedRow]:
    """The same items. Raises: DatasetError once more than this share of them is rejected."""
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
    store: BlobStore,
    record: JobRecord,
    items: Iterable[NumberedTriplet | RejectedRow],
    columns: Columns,
) -> Iterator[int | RejectedRow]:
    """The rows of each shard once it is written, the rejected rows in between; collects columns."""
    folder = JobFolder(record.id)
    index = 0
    rows = ShardRows()

    def written() -> int:
        # A plan that was interrupted has written the first ones.
        if not store.exists(folder.shard(index)):
            with store.create(folder.shard(index)) as blob:
                rows.write(blob)
        return len(rows.numbers)

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
