"""Task 3: put the parts together, in input order, into the results."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cwpo.datasets import JsonlWriter, ParquetWriter
from cwpo.types import JobProgress
from cwpo_worker.errors import IllegalTransitionError, IncompleteJobError, ModelChangedError
from cwpo_worker.job import JobRecord, now
from cwpo_worker.ledger import Ledger
from cwpo_worker.manifest import JobFolder, Manifest, Shard

_BATCH_ROWS = 2048


def merge(ledger: Ledger, job_id: str) -> None:
    """Write results.parquet, results.jsonl and errors.jsonl, and complete the job.

    Memory holds one part at a time; run twice, the second finds everything there.
    Raises: IncompleteJobError when the parts are not those of the manifest, row for row;
    ModelChangedError; JobStoppedError; StoreError.
    """
    record = ledger.records.expect(job_id, "finalizing")
    folder = JobFolder(job_id)
    manifest = folder.read_manifest(ledger.store)
    annotated = _check_parts(ledger, folder, manifest)
    _write_results(ledger, folder, manifest)
    _write_errors(ledger, folder, manifest)
    _complete(ledger, record, manifest, annotated)


def _check_parts(ledger: Ledger, folder: JobFolder, manifest: Manifest) -> int:
    """The annotated rows, once it is sure that each row of each shard is annotated or failed."""
    there = {key for key in ledger.store.list(folder.parts) if key.endswith(".parquet")}
    wanted = {folder.part(shard.index) for shard in manifest.shards}
    if there != wanted:
        raise IncompleteJobError(
            f"{len(wanted - there)} parts of {len(wanted)} are missing, {len(there - wanted)} are "
            f"not in the manifest: {', '.join(sorted(there ^ wanted)[:3])}"
        )
    annotated = 0
    models = set()
    for shard in manifest.shards:
        with ledger.store.open(folder.part(shard.index)) as part:
            footer = pq.read_metadata(part)
        failed = sum(1 for _ in _part_errors(ledger, folder, shard))
        if footer.num_rows + failed != shard.rows:
            raise IncompleteJobError(
                f"part {shard.index} has {footer.num_rows:,} annotated and {failed:,} failed rows "
                f"for the {shard.rows:,} of its shard"
            )
        annotated += footer.num_rows
        if footer.num_rows:
            models.add(footer.metadata.get(b"cwpo.annotator"))
    if len(models) > 1:
        raise ModelChangedError("the parts are of different annotators: submit the job again")
    return annotated


def _write_results(ledger: Ledger, folder: JobFolder, manifest: Manifest) -> None:
    with ExitStack() as stack:
        parquet = ParquetWriter(stack.enter_context(ledger.store.create(folder.results("parquet"))))
        jsonl = JsonlWriter(stack.enter_context(ledger.store.create(folder.results("jsonl"))))
        for table in _tables(ledger, folder, manifest):
            parquet.write_table(table)
            jsonl.write(table.to_pylist())
        parquet.close()


def _tables(ledger: Ledger, folder: JobFolder, manifest: Manifest) -> Iterator[pa.Table]:
    """The rows of all parts, in order; parts without rows have no kind of prompt to go by."""
    for shard in manifest.shards:
        with ledger.store.open(folder.part(shard.index)) as source, pq.ParquetFile(source) as part:
            for batch in part.iter_batches(_BATCH_ROWS):
                if batch.num_rows:
                    yield pa.Table.from_batches([batch], part.schema_arrow)


def _write_errors(ledger: Ledger, folder: JobFolder, manifest: Manifest) -> None:
    in_shards = (line for shard in manifest.shards for line in _part_errors(ledger, folder, shard))
    with (
        ledger.store.open(folder.rejected) as rejected,
        ledger.store.create(folder.errors) as sink,
    ):
        writer = JsonlWriter(sink)
        for line in heapq.merge(map(json.loads, rejected), in_shards, key=lambda line: line["row"]):
            writer.write([line])


def _part_errors(ledger: Ledger, folder: JobFolder, shard: Shard) -> Iterator[dict[str, Any]]:
    key = folder.part_errors(shard.index)
    if ledger.store.exists(key):
        with ledger.store.open(key) as lines:
            yield from map(json.loads, lines)


def _complete(ledger: Ledger, record: JobRecord, manifest: Manifest, annotated: int) -> None:
    failed = manifest.rows - annotated
    seconds = (now() - (record.started_at or record.created_at)).total_seconds()
    progress = JobProgress(
        rows_total=manifest.rows,
        rows_done=manifest.rows,
        rows_annotated=annotated,
        rows_failed=failed,
        rows_per_second=manifest.rows / seconds if seconds > 0 else None,
        eta_seconds=0.0,
    )
    with suppress(IllegalTransitionError):  # A twin of this task was faster.
        ledger.records.move(
            record.id, "completed_with_errors" if failed else "completed", progress=progress
        )
