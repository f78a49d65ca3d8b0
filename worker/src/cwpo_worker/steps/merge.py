"""Task 3: check the parts, publish them as the dataset, and merge them where they are small."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from hashlib import sha256
from itertools import groupby
from typing import Any

from cwpo.columns import Column
from cwpo.datasets.weighted import annotator_of
from cwpo.types import DatasetColumn, JobProgress, Merge
from cwpo_worker.errors import BlobNotFoundError, IncompleteJobError, ModelChangedError
from cwpo_worker.jobs.confidences import Confidences
from cwpo_worker.jobs.dataset import (
    MERGED_BYTES,
    MERGED_ROWS,
    PAGE_PARTS,
    CheckedPart,
    Dataset,
    Kind,
    PartsPage,
    Summary,
)
from cwpo_worker.jobs.finished_shards import RowCounts
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.manifest import JobFolder, Manifest
from cwpo_worker.jobs.record import JobRecord, now
from cwpo_worker.jobs.shard_ranges import joined
from cwpo_worker.steps.merged_files import ErrorsFile, MergedFiles
from cwpo_worker.steps.part import Part, ShardEntry, complete_part, read_part
from cwpo_worker.steps.shard_rows import read_shard
from cwpo_worker.storage.store import BlobStore

# How many parts are read at a time: a billion rows have half a million of them.
PARTS_AHEAD = 8


def merge_parts(lifecycle: Lifecycle, store: BlobStore, job_id: str) -> None:
    """Publish the dataset, and end the job.

    The parts are the dataset, in the order of their shards. A part that was annotated before a
    later file brought another column, or another type, is in the dataset as a copy with all
    columns. If the parts are small, they are also merged into results.parquet and results.jsonl;
    errors.jsonl is always written. If the job is being cancelled, the dataset has its finished
    shards. Only a few parts are in memory at a time. If this runs twice, the second run finds what
    the first has published.

    Raises: IncompleteJobError if the parts do not match the manifest, row for row;
    ModelChangedError; JobStoppedError; StoreError.
    """
    record = lifecycle.expect(job_id, "finalizing", "cancelling")
    whole = record.folder.read_manifest(store)
    wanted = partial(lifecycle.expect, job_id, record.state)
    if record.state == "finalizing":
        folder = record.folder
        summary = _Publication(store, folder, wanted).run(whole, record.merge, whole.rows)
        lifecycle.complete(record, _progress(record, whole, summary))
    else:
        folder = JobFolder(job_id, edition=record.version, repins=record.repins)
        finished = _finished(store, folder, whole)
        summary = _Publication(store, folder, wanted).run(finished, record.merge)
        progress = _progress(record, finished, summary).model_copy(update={"eta_seconds": None})
        lifecycle.end_cancelled(job_id, progress, edition=record.version)


def discard_shards(lifecycle: Lifecycle, store: BlobStore, job_id: str) -> None:
    """Remove the shards of a job that has completed; a job that may be resumed needs its own.

    Raises: UnknownJobError; StoreError.
    """
    if lifecycle.registry.get(job_id).state in ("completed", "completed_with_errors"):
        store.delete_folder(JobFolder(job_id).shards)


def _finished(store: BlobStore, folder: JobFolder, whole: Manifest) -> Manifest:
    """A manifest of the finished shards, stored since more may finish during the merge."""
    there = set(store.list(folder.parts))
    shards = joined(
        (number, number + 1) for number in whole.numbers if folder.part(number) in there
    )
    with store.create(folder.manifest) as blob:
        blob.write(whole.model_copy(update={"shards": shards}).model_dump_json().encode())
    return folder.read_manifest(store)


class _Publication:
    """Checks the parts of a job, and publishes the dataset that they are.

    What an interrupted run has found is kept in the pages that it published: of their parts only
    those are read again whose rows or errors are needed.

    Args:
        wanted: called before each part; raises JobStoppedError once the dataset is not wanted.
    """

    def __init__(self, store: BlobStore, folder: JobFolder, wanted: Callable[[], object]) -> None:
        self._store = store
        self._folder = folder
        self._dataset = Dataset(store, folder)
        self._wanted = wanted
        self._kind: Kind | None = None
        self._columns: list[Column] = []
        self._last_row = 0

    def run(self, manifest: Manifest, merge: Merge, expected: int | None = None) -> Summary:
        """Publish the errors file, single files if they are small, the pages, then the summary.

        Args:
            expected: number of rows of the input; None if some of its shards are not finished.
        Raises: IncompleteJobError; ModelChangedError; JobStoppedError; StoreError.
        """
        published = self._dataset.summary()
        if published is not None:
            return published
        self._columns = manifest.columns
        with ExitStack() as stack:
            merged = None
            if merge == "auto" and manifest.rows <= MERGED_ROWS:
                merged = stack.enter_context(closing(MergedFiles(self._store, self._folder)))
            rejected = stack.enter_context(closing(self._rejected(manifest)))
            sink = stack.enter_context(self._store.create(self._folder.errors))
            errors = ErrorsFile(sink, rejected)
            rows = annotated = failed = size = pages = 0
            confidences: list[Confidences | None] = []
            for number, shards in groupby(manifest.numbers, lambda index: index // PAGE_PARTS):
                page = self._checked(number, shards, merged, errors)
                confidences.append(page.confidences)
                for part in page.parts:
                    rows += part.rows
                    annotated += part.rows if part.annotated is None else part.annotated
                    failed += part.failed
                    size += part.bytes if part.rows else 0
                if merged is not None and (size > MERGED_BYTES or rows > MERGED_ROWS):
                    merged.close()
                    merged = None
                pages = number + 1
            found = annotated + failed + manifest.rejected
            if expected not in (None, found):
                raise IncompleteJobError(
                    f"the parts and the rejected rows are {found:,} rows, of {expected:,}"
                )
            checksums = {} if merged is None else merged.publish()
            errors.close()
        summary = Summary(
            rows=rows,
            annotated=annotated if annotated != rows else None,
            failed=failed,
            bytes=size,
            pages=pages,
            kind=self._kind,
            merged=checksums,
            confidences=None
            if None in confidences
            else Confidences.joined(each for each in confidences if each is not None),
        )
        self._dataset.publish(summary)
        return summary

    def _rejected(self, manifest: Manifest) -> Generator[dict[str, Any]]:
        """The lines of the rows that were rejected when they were planned."""
        keys = [self._folder.rejected]
        if manifest.next_file is not None:
            keys = self._folder.rejected_files(self._store, manifest.next_file, manifest.checkpoint)
        for key in keys:
            with self._store.open(key) as lines:
                yield from map(json.loads, lines)

    def _checked(
        self,
        number: int,
        shards: Iterable[int],
        merged: MergedFiles | None,
        errors: ErrorsFile,
    ) -> PartsPage:
        """A page, once it is published and its parts are in the files."""
        page = self._dataset.page(number)
        known = {} if page is None else {part.index: part for part in page.parts}
        if page is not None and page.kind is not None:
            self._expect_kind(page.kind, f"page {number}")
        of_page = list(shards)
        unread = [
            index
            for index in of_page
            if merged is not None or index not in known or known[index].failed
        ]
        confidences = []
        for index, part in zip(unread, _read_ahead(self._read, unread), strict=True):
            self._wanted()
            whole = self._completed(index, part)
            known[index] = self._check(index, whole, is_completed=whole is not part)
            if page is None and part.counts.annotated:
                confidences.append(Confidences.of(index, part.confidences))
            errors.write(part.errors)
            if merged is not None:
                merged.write(whole.rows())
        checked = [known[index] for index in of_page]
        if page is not None:
            return page.model_copy(update={"parts": checked})
        kind = self._kind if any(part.rows for part in checked) else None
        page = PartsPage(parts=checked, kind=kind, confidences=Confidences.joined(confidences))
        self._dataset.publish_page(number, page)
        return page

    def _read(self, index: int) -> Part:
        """The part of a shard. Raises: IncompleteJobError if it is missing."""
        try:
            return read_part(self._store, self._folder.part(index))
        except BlobNotFoundError:
            raise IncompleteJobError(f"part {index} is missing") from None

    def _completed(self, index: int, part: Part) -> Part:
        """The part, or a copy of it if it lacks columns of the dataset or has others.

        Raises: IncompleteJobError if that would take a shard that is missing.
        """
        if not part.counts.annotated or part.columns == self._columns:
            return part
        try:
            rows = read_shard(self._store.read(self._folder.shard(index)))
        except BlobNotFoundError:
            raise IncompleteJobError(f"shard {index} is missing") from None
        key = self._folder.completed_part(index)
        return complete_part(self._store, key, part, rows, self._columns)

    def _check(self, index: int, part: Part, *, is_completed: bool) -> CheckedPart:
        """Compare a part with its shard, and with the parts before it.

        Raises: IncompleteJobError if it lacks a result or an error for a row of its shard, has rows
        of an earlier one, or other columns than the others; ModelChangedError.
        """
        if part.shard is not None:
            self._expect_rows(index, part.counts, part.shard)
        counts = part.counts
        if counts.annotated:
            columns = [DatasetColumn(name=each.name, type=str(each.type)) for each in part.schema]
            kind = Kind(columns=columns, model=annotator_of(part.schema))
            self._expect_kind(kind, f"part {index}")
        return CheckedPart(
            index=index,
            rows=counts.pairs,
            annotated=counts.annotated if counts.annotated != counts.pairs else None,
            failed=counts.failed,
            bytes=len(part.content),
            sha256=sha256(part.content).hexdigest(),
            is_completed=is_completed,
        )

    def _expect_rows(self, index: int, counts: RowCounts, shard: ShardEntry) -> None:
        if counts.annotated + counts.failed != shard.rows:
            raise IncompleteJobError(
                f"part {index} has {counts.annotated:,} annotated and {counts.failed:,} failed "
                f"rows for the {shard.rows:,} of its shard"
            )
        if shard.first_row <= self._last_row:
            raise IncompleteJobError(
                f"part {index} begins with row {shard.first_row:,}, and a part before it ends with "
                f"row {self._last_row:,}"
            )
        self._last_row = shard.last_row

    def _expect_kind(self, kind: Kind, place: str) -> None:
        known = self._kind = self._kind or kind
        if kind.model != known.model:
            raise ModelChangedError(
                "the parts are of different annotators: resume the job with --repin"
            )
        if kind.columns != known.columns:
            raise IncompleteJobError(f"{place} has other columns than the parts before it")


def _read_ahead(read: Callable[[int], Part], shards: Sequence[int]) -> Iterator[Part]:
    """The parts of the shards, in order; in an object store most of the time is waiting."""
    pending: deque[Future[Part]] = deque()
    with ThreadPoolExecutor(PARTS_AHEAD) as pool:
        for index in shards:
            pending.append(pool.submit(read, index))
            if len(pending) == PARTS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _progress(record: JobRecord, manifest: Manifest, summary: Summary) -> JobProgress:
    done = summary.input_rows + summary.failed + manifest.rejected
    seconds = (now() - (record.started_at or record.created_at)).total_seconds()
    return JobProgress(
        rows_total=record.progress.rows_total,
        rows_done=done,
        rows_annotated=summary.input_rows,
        rows_failed=done - summary.input_rows,
        pairs_annotated=None if record.pairs is None else summary.rows,
        rows_per_second=done / seconds if seconds > 0 else None,
        eta_seconds=0.0,
    )
