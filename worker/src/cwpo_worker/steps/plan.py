"""Task 1: split the input into shards, and set aside the rows that cannot be annotated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from cwpo.columns import Columns
from cwpo.datasets.triplets import (
    NumberedItem,
    NumberedRow,
    RejectedRow,
    file_format,
    read_rows,
    rows_of_responses,
    rows_through,
    triplets_of,
)
from cwpo.datasets.weighted import JsonlWriter
from cwpo.errors import DatasetError
from cwpo.types import FileFormat, ItemError
from cwpo_worker.errors import BlobNotFoundError
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.manifest import Continuation, JobFolder, Manifest
from cwpo_worker.jobs.record import JobRecord
from cwpo_worker.jobs.shard_ranges import joined
from cwpo_worker.steps.shard_rows import ShardRows, characters_in_dataset
from cwpo_worker.storage.inputs import INPUTS, Input, sha256_of
from cwpo_worker.storage.store import BlobStore, Draft
from cwpo_worker.storage.uploads import FileCatalog

# A shard of long texts is closed before its rows are too much for a worker's memory.
SHARD_CHARACTERS = 32 << 20
# Fewer rows say little about the share of bad ones.
JUDGED_ROWS = 1000
# The first shards of a plan that are annotated while it goes on; then as many again as there are,
# so that even a plan of a million shards publishes few manifests. A plan that is begun again leaves
# what it left before only as long as this is the same.
CHECKPOINT_SHARDS = 8


@dataclass(frozen=True, slots=True)
class Source:
    """An input of a job, with its format and checksum; the name is for messages."""

    name: str
    stream: BinaryIO
    format: FileFormat
    sha256: str


def plan_file(lifecycle: Lifecycle, store: BlobStore, job_id: str, file: int = 0) -> None:
    """Write the shards of the next input file, and let them have their turns.

    Files that fill no shard are planned together. What is known then is published as the manifest
    of the first files, with which the plan of the next file begins, and after the last file as the
    manifest of the job. The shards of a long file have their turns before it is read to its end. If
    this runs twice, the second run finds what the first has published.

    Args:
        file: the number of the file, counted from 0.
    Raises: DatasetError if the file cannot be read, or all files together have no rows or too large
    a share of invalid rows; JobStoppedError if the job was cancelled, or the file is planned;
    StoreError.
    """
    record = lifecycle.expect_planning(job_id, file)
    manifest = _planned(store, JobFolder(job_id))
    if manifest is None or (manifest.next_file is not None and manifest.next_file <= file):
        plan = _Plan(
            store,
            record,
            manifest,
            wanted=lambda: lifecycle.expect_planning(job_id, file),
            note=lifecycle.note_planned,
        )
        manifest = plan.run()
    if manifest.is_whole and not manifest.rows:
        raise DatasetError("the input has no rows")
    lifecycle.note_planned(manifest)


def _planned(store: BlobStore, folder: JobFolder) -> Manifest | None:
    """The manifest of the files that are planned; None if there is none."""
    try:
        manifest = folder.read_manifest(store)
        if manifest.checkpoint is None:
            return manifest
        return Manifest.model_validate_json(store.read(folder.first_files(manifest.next_file or 0)))
    except BlobNotFoundError:
        return None


class _Plan:
    """Cuts files into shards, as one file would be cut: a shard may hold rows of several.

    Args:
        before: what the files before them came to; None for none.
        wanted: called after each shard; raises JobStoppedError once the plan is not wanted.
        note: called with each manifest that is published in the midst of the plan.
    """

    def __init__(
        self,
        store: BlobStore,
        record: JobRecord,
        before: Manifest | None,
        wanted: Callable[[], object],
        note: Callable[[Manifest], object],
    ) -> None:
        self._store = store
        self._record = record
        self._folder = JobFolder(record.id)
        self._shard_rows = record.shard_rows
        self._wanted = wanted
        self._note = note
        at = Continuation() if before is None else before.continuation or Continuation()
        self._begun = at
        self._at = at.model_copy(deep=True)
        self._sources = _sources(store, record)
        self._rows = 0 if before is None else before.rows
        self._rejected = 0 if before is None else before.rejected
        self._shards = self._begun_shards = 0 if before is None else before.shard_count
        self._checkpoint = self._shards + CHECKPOINT_SHARDS
        self._errors = _Errors(store, self._folder)
        self._columns = Columns(at.kinds)
        self._open = ShardRows(record.pairs)
        if at.characters:
            blob = store.read(self._folder.open_shard(at.files))
            self._open = ShardRows.read(blob, at.characters, record.pairs)

    def run(self) -> Manifest:
        """Plan files until a shard is full, or there are no more; returns what is published."""
        at = self._at
        with closing(self._errors):
            while at.files < len(self._sources) and self._shards == self._begun_shards:
                self._read(self._sources[at.files])
                at.files += 1
            self._errors.publish(self._folder.rejected_up_to(at.files))
        if at.files == len(self._sources):
            return self._publish_all()
        return self._publish_first_files()

    def _read(self, opening: AbstractContextManager[Source]) -> None:
        at = self._at
        with opening as source:
            at.checksums.append(source.sha256)
            rows = rows_through([_rows(source)], at.last_row)
            last_row = at.last_row
            for item in self._parsed(rows):
                self._rows += 1
                last_row = item.row
                if isinstance(item, RejectedRow):
                    self._reject(item)
                else:
                    self._add(item)
                if self._rejected and self._rows >= JUDGED_ROWS:
                    self._expect_few_rejected(source)
            at.last_row = last_row

    def _parsed(
        self, rows: Iterator[tuple[int, dict[str, Any] | str]]
    ) -> Iterator[NumberedRow | RejectedRow]:
        if self._record.pairs is None:
            return triplets_of(rows, self._at.is_chat)
        return map(self._bounded, rows_of_responses(rows, self._at.is_chat))

    def _bounded(self, row: NumberedRow | RejectedRow) -> NumberedRow | RejectedRow:
        """The row, unless its pairs alone would be too much for a worker's memory."""
        if not isinstance(row, NumberedItem):
            return row
        size = characters_in_dataset(row, self._record.pairs)
        if size <= SHARD_CHARACTERS:
            return row
        detail = (
            f"its pairs would have {size:,} characters together, of at most {SHARD_CHARACTERS:,}: "
            "name fewer pairs with --pairs, or list fewer responses"
        )
        return RejectedRow(row.row, row.id, ItemError(code="invalid_row", detail=detail))

    def _reject(self, row: RejectedRow) -> None:
        self._rejected += 1
        if self._at.first_rejected is None:
            self._at.first_rejected = f"row {row.row}: {row.error.detail}"
        self._errors.write(row)

    def _add(self, row: NumberedRow) -> None:
        rows = self._open
        if row.extra:
            self._columns.learn(row.extra)
        if self._at.is_chat is None:
            self._at.is_chat = not isinstance(row.prompt, str)
        rows.add(row)
        if rows.size >= self._shard_rows or rows.characters >= SHARD_CHARACTERS:
            self._write_shard()
            self._wanted()
            if self._shards == self._checkpoint:
                self._publish_midst()

    def _write_shard(self) -> None:
        key = self._folder.shard(self._shards)
        # A plan that was interrupted has written the first ones.
        if not self._store.exists(key):
            with self._store.create(key) as blob:
                self._open.write(blob)
        self._shards += 1
        self._open = ShardRows(self._record.pairs)

    def _expect_few_rejected(self, source: Source) -> None:
        """Raises: DatasetError once more than the job's share of all rows so far is rejected."""
        share = self._record.max_rejected_share
        if self._rejected > share * self._rows:
            place = f", up to {source.name}," if len(self._sources) > 1 else ""
            raise DatasetError(
                f"{self._rejected:,} of the first {self._rows:,} rows{place} are invalid, a larger "
                f"share than max_rejected_share = {share:g} allows; the first is "
                f"{self._at.first_rejected}"
            )

    def _publish_midst(self) -> None:
        """Publish the shards so far, and let them have their turns."""
        self._errors.publish(self._folder.rejected_up_to(self._begun.files, self._shards))
        key = self._folder.first_files(self._begun.files, self._shards)
        self._note(self._publish(key, self._begun, self._shards))
        self._checkpoint += self._shards - self._begun_shards

    def _publish_first_files(self) -> Manifest:
        """Publish what the plan of the next file begins with."""
        at = self._at
        at.kinds = self._columns.kinds
        at.characters = self._open.characters
        if self._open.numbers:
            with self._store.create(self._folder.open_shard(at.files)) as blob:
                self._open.write(blob)
        return self._publish(self._folder.first_files(at.files), at)

    def _publish_all(self) -> Manifest:
        """Publish the last shard, the file of rejected rows, and the manifest."""
        if self._open.numbers:
            self._write_shard()
        with self._store.create(self._folder.rejected) as sink:
            for key in self._folder.rejected_files(self._store, len(self._sources)):
                with self._store.open(key) as source:
                    shutil.copyfileobj(source, sink)
        return self._publish(self._folder.manifest, None)

    def _publish(
        self, key: str, continuation: Continuation | None, checkpoint: int | None = None
    ) -> Manifest:
        manifest = Manifest(
            job_id=self._record.id,
            input_sha256=_checksum(self._at.checksums),
            truncation=self._record.truncation,
            rows=self._rows,
            rejected=self._rejected,
            columns=self._columns.known(),
            shards=joined([(0, self._shards)]),
            continuation=continuation,
            checkpoint=checkpoint,
        )
        with self._store.create(key) as blob:
            blob.write(manifest.model_dump_json(exclude_none=True).encode())
        return manifest


class _Errors:
    """The rows that were rejected since the last manifest."""

    def __init__(self, store: BlobStore, folder: JobFolder) -> None:
        self._store = store
        self._folder = folder
        self._draft: Draft | None = None

    def write(self, row: RejectedRow) -> None:
        """Append a row."""
        if self._draft is None:
            self._draft = self._store.draft(self._folder.rejected)
        JsonlWriter(self._draft).write([row.as_dict()])

    def publish(self, key: str) -> None:
        """Publish the rows, if there are any."""
        if self._draft is not None:
            self._draft.publish(key)
            self._draft = None

    def close(self) -> None:
        """Discard what was not published."""
        if self._draft is not None:
            self._draft.close()


def _sources(store: BlobStore, record: JobRecord) -> list[AbstractContextManager[Source]]:
    """The inputs in order, each to be opened when it is read."""
    sources: list[AbstractContextManager[Source]] = [
        _upload(store, file_id) for file_id in record.files
    ]
    if record.input_url is not None:
        sources.append(_input(Input(record.input_url, record.input_version or "")))
    if record.prefix is not None:
        sources += map(_input, INPUTS.validate_json(store.read(JobFolder(record.id).inputs)))
    return sources


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


def _rows(source: Source) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        yield from read_rows(source.stream, source.format)
    except DatasetError as error:
        raise DatasetError(f"{source.name}: {error}") from error


def _checksum(checksums: list[str]) -> str:
    """That of the input: of several files, the checksum of theirs, a line each."""
    return (
        checksums[0] if len(checksums) == 1 else sha256("\n".join(checksums).encode()).hexdigest()
    )
