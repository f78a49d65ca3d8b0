"""The weighted dataset as single files, made from parts in their order, with the errors file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import pyarrow as pa
from pydantic_core import to_json

from cwpo.columns import rows_of
from cwpo.datasets.weighted import JsonlWriter, ParquetWriter
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.storage.store import BlobStore

ROW_GROUP_BYTES = 8 << 20


class MergedFiles:
    """The weighted dataset in both formats; a row group has several parts.

    A second thread compresses Parquet, which does not need Python's lock.
    """

    def __init__(self, store: BlobStore, folder: JobFolder) -> None:
        self._folder = folder
        self._drafts = {name: store.draft(folder.results(name)) for name in ("parquet", "jsonl")}
        self._parquet = ParquetWriter(self._drafts["parquet"])
        self._pending: list[pa.Table] = []
        self._thread = ThreadPoolExecutor(1)

    def write(self, rows: pa.Table) -> None:
        """Append the rows of a part."""
        if rows.num_rows:  # Without rows it does not know of what kind its prompts are.
            self._pending.append(rows)
        if sum(table.nbytes for table in self._pending) >= ROW_GROUP_BYTES:
            self._write_group()

    def publish(self) -> dict[str, str]:
        """Write the remaining rows, and publish the files, unless they are there.

        Returns: the checksums (SHA-256) by format, without those of files that were there.
        """
        if self._pending:
            self._write_group()
        self._parquet.close()
        checksums = {name: draft.sha256() for name, draft in self._drafts.items()}
        return {
            name: checksums[name]
            for name, draft in self._drafts.items()
            if draft.publish(self._folder.results(name))
        }

    def close(self) -> None:
        """Discard the files, if they were not published."""
        self._thread.shutdown()
        for draft in self._drafts.values():
            draft.abort()

    def _write_group(self) -> None:
        table = pa.concat_tables(self._pending)
        self._pending.clear()
        group = self._thread.submit(self._parquet.write_table, table)
        self._drafts["jsonl"].write(b"".join([to_json(row) + b"\n" for row in rows_of(table)]))
        group.result()


class ErrorsFile:
    """The errors file, sorted by row: rows that the plan rejected, and rows that failed later."""

    def __init__(self, sink: BinaryIO, rejected: Iterator[dict[str, Any]]) -> None:
        self._writer = JsonlWriter(sink)
        self._rejected = rejected
        self._next = next(rejected, None)

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines, sorted by row, with the rejected rows between them."""
        for line in lines:
            self._write_rejected(line["row"])
            self._writer.write([line])

    def close(self) -> None:
        """Append the remaining rejected rows."""
        self._write_rejected(math.inf)

    def _write_rejected(self, up_to: float) -> None:
        while self._next is not None and self._next["row"] <= up_to:
            self._writer.write([self._next])
            self._next = next(self._rejected, None)
