"""POST /files, GET and DELETE /files/{id}: uploads of triplets."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from base64 import b64encode
from pathlib import Path

from cwpo.connection import AsyncConnection, Connection, chunks
from cwpo.datasets.triplets import file_format
from cwpo.progress import Progress
from cwpo.transport import Call
from cwpo.types import File, FileFormat

CONTENT_TYPES: dict[FileFormat, str] = {
    "jsonl": "application/x-ndjson",
    "jsonl.gz": "application/gzip",
    "parquet": "application/vnd.apache.parquet",
}


class Files:
    """Uploaded files, as `client.files`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(
        self,
        path: str | Path,
        *,
        progress: Progress | None = None,
        idempotency_key: str | None = None,
    ) -> File:
        """Stream a JSONL, JSONL.gz or Parquet file of triplets to the service, with its checksum.

        Args:
            progress: shows the bytes whose checksum has been computed, then the bytes sent.
            idempotency_key: name of this upload: however often it is sent, there is one file; by
                default a new one.
        Raises: DatasetError for a file with another suffix.
        """
        return self._connection.send(_upload(Path(path), progress, idempotency_key), progress)

    def get(self, file_id: str) -> File:
        """The format, size and checksum of an uploaded file."""
        return self._connection.send(_get(file_id))

    def delete(self, file_id: str) -> File:
        """Delete an uploaded file, and return it. Raises: ConflictError if a job needs it."""
        return self._connection.send(_delete(file_id))


class AsyncFiles:
    """Uploaded files, as `client.files`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def upload(
        self,
        path: str | Path,
        *,
        progress: Progress | None = None,
        idempotency_key: str | None = None,
    ) -> File:
        """Stream a JSONL, JSONL.gz or Parquet file of triplets to the service, with its checksum.

        Args:
            progress: shows the bytes whose checksum has been computed, then the bytes sent.
            idempotency_key: name of this upload: however often it is sent, there is one file; by
                default a new one.
        Raises: DatasetError for a file with another suffix.
        """
        call = await asyncio.to_thread(_upload, Path(path), progress, idempotency_key)
        return await self._connection.send(call, progress)

    async def get(self, file_id: str) -> File:
        """The format, size and checksum of an uploaded file."""
        return await self._connection.send(_get(file_id))

    async def delete(self, file_id: str) -> File:
        """Delete an uploaded file, and return it. Raises: ConflictError if a job needs it."""
        return await self._connection.send(_delete(file_id))


def _upload(path: Path, progress: Progress | None, idempotency_key: str | None) -> Call[File]:
    """The file's checksum goes ahead of it in a header: the file is read for this."""
    content_type = CONTENT_TYPES[file_format(path)]
    digest, size = hashlib.sha256(), 0
    for chunk in chunks(path, "checksum", progress):
        digest.update(chunk)
        size += len(chunk)
    headers = {
        "Content-Type": content_type,
        "Content-Length": str(size),
        "Content-Digest": f"sha-256=:{b64encode(digest.digest()).decode()}:",
        "Idempotency-Key": idempotency_key or uuid.uuid4().hex,
    }
    return Call("POST", "/files", File, file=path, headers=headers)


def _get(file_id: str) -> Call[File]:
    return Call("GET", f"/files/{file_id}", File)


def _delete(file_id: str) -> Call[File]:
    return Call("DELETE", f"/files/{file_id}", File)
