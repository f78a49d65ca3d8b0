"""Task 3: put the parts together, in input order, into the results."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from typing import Any

import pyarrow as pa
from pydantic_core import to_json

from cwpo.columns import rows_of
from cwpo.datasets import JsonlWriter, ParquetWriter
from cwpo.types import JobProgress, JobState
from cwpo_worker import part
from cwpo_worker.errors import IllegalTransitionError, IncompleteJobError, ModelChangedError
from cwpo_worker.job import JobRecord, now
from cwpo_worker.ledger import Ledger
from cwpo_worker.manifest import JobFolder, Manifest

ROW_GROUP_BYTES = 8 << 20


def merge(ledger: Ledger, job_id: str) -> None:
    """Write results.parquet, results.jsonl and errors.jsonl, and end the job.

    Of a job that is being cancelled they hold the shards that are finished. Memory holds a few
    parts at a time; run twice, the second finds everything there.
    Raises: IncompleteJobError when the parts are not those of the manifest, row for row;
    ModelChangedError; JobStoppedError; StoreError.
    """
    record = ledger.records.expect(job_id, "finalizing", "cancelling")
    edition = record.version if record.state == "cancelling" else None
    folder = JobFolder(job_id, edition)
    whole = JobFolder(job_id).read_manifest(ledger.store)
    manifest = whole if edition is None else _finished(ledger, folder, whole)
    annotated = _check_parts(ledger, folder, whole, manifest)
    _write_results(ledger, folder, manifest)
    _write_errors(ledger, folder, manifest)
    if edition is None:
        progress = _progress(record, manifest, annotated)
        state: JobState = "completed_with_errors" if progress.rows_failed else "completed"
        _move(ledger, job_id, state, progress=progress)
    else:
        progress = _progress(record, manifest, annotated).model_copy(
            update={"rows_total": whole.rows, "eta_seconds": None}
        )
        _move(ledger, job_id, "cancelled", progress=progress, edition=edition)


def _finished(ledger: Ledger, folder: JobFolder, whole: Manifest) -> Manifest:
    """The finished shards, written down: another one may be finished while they are merged."""
    there = set(ledger.store.list(folder.parts))
    shards = [shard for shard in whole.shards if folder.part(shard.index) in there]
    with ledger.store.create(folder.manifest) as blob:
        blob.write(whole.model_copy(update={"shards": shards}).model_dump_json().encode())
    return folder.read_manifest(ledger.store)


def _check_parts(ledger: Ledger, folder: JobFolder, whole: Manifest, manifest: Manifest) -> int:
    """The annotated rows, once it is sure that each row of each shard is annotated or failed."""
    there = set(ledger.store.list(folder.parts))
    missing = {folder.part(shard.index) for shard in manifest.shards} - there
    foreign = there - {folder.part(shard.index) for shard in whole.shards}
    if missing or foreign:
        raise IncompleteJobError(
            f"{len(missing)} parts of {len(manifest.shards)} are missing, {len(foreign)} are "
            f"not in the manifest: {', '.join(sorted(missing | foreign)[:3])}"
        )
    annotated = 0
    models = set()
    for shard in manifest.shards:
        found = part.read(ledger.store, folder.part(shard.index))
        if found.annotated + len(found.errors) != shard.rows:
            raise IncompleteJobError(
                f"part {shard.index} has {found.annotated:,} annotated and {len(found.errors):,} "
                f"failed rows for the {shard.rows:,} of its shard"
            )
        annotated += found.annotated
        if found.annotated:
            models.add(found.schema.metadata[b"cwpo.annotator"])
    if len(models) > 1:
        raise ModelChangedError("the parts are of different annotators: submit the job again")
    return annotated


def _write_results(ledger: Ledger, folder: JobFolder, manifest: Manifest) -> None:
    """Both formats at once: Parquet is compressed on a thread that Python does not hold up."""
    with (
        ledger.store.create(folder.results("parquet")) as parquet_sink,
        ledger.store.create(folder.results("jsonl")) as jsonl_sink,
        ThreadPoolExecutor(1) as thread,
    ):
        parquet = ParquetWriter(parquet_sink)
        for table in _tables(ledger, folder, manifest):
            group = thread.submit(parquet.write_table, table)
            jsonl_sink.write(b"".join([to_json(row) + b"\n" for row in rows_of(table)]))
            group.result()
        parquet.close()


def _tables(ledger: Ledger, folder: JobFolder, manifest: Manifest) -> Iterator[pa.Table]:
    """The rows of all parts, in order, some parts at a time: each table is a row group."""
    pending: list[pa.Table] = []
    for shard in manifest.shards:
        table = part.read_table(ledger.store, folder.part(shard.index))
        if table.num_rows:  # Without rows it does not know of what kind its prompts are.
            pending.append(table)
        if sum(table.nbytes for table in pending) >= ROW_GROUP_BYTES:
            yield pa.concat_tables(pending)
            pending.clear()
    if pending:
        yield pa.concat_tables(pending)


def _write_errors(ledger: Ledger, folder: JobFolder, manifest: Manifest) -> None:
    in_shards = (
        line
        for shard in manifest.shards
        for line in part.read(ledger.store, folder.part(shard.index)).errors
    )
    with (
        ledger.store.open(folder.rejected) as rejected,
        ledger.store.create(folder.errors) as sink,
    ):
        writer = JsonlWriter(sink)
        for line in heapq.merge(map(json.loads, rejected), in_shards, key=itemgetter("row")):
            writer.write([line])


def _move(ledger: Ledger, job_id: str, state: JobState, **changes: Any) -> None:
    with suppress(IllegalTransitionError):  # A twin of this task was faster.
        ledger.records.move(job_id, state, **changes)


def _progress(record: JobRecord, manifest: Manifest, annotated: int) -> JobProgress:
    seconds = (now() - (record.started_at or record.created_at)).total_seconds()
    return JobProgress(
        rows_total=manifest.rows,
        rows_done=manifest.rows,
        rows_annotated=annotated,
        rows_failed=manifest.rows - annotated,
        rows_per_second=manifest.rows / seconds if seconds > 0 else None,
        eta_seconds=0.0,
    )
