"""Uploaded files: the bytes, and what is known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import BinaryIO

from cwpo.types import File, FileFormat
from cwpo_worker import ids
from cwpo_worker.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    IdempotencyConflictError,
    UnknownFileError,
)
from cwpo_worker.store import BlobStore


class FileRecord(File):
    """A file and whose it is; None where no API keys are set."""

    owner: str | None = None

    def public(self) -> File:
        """What the REST contract shows of it."""
        return File(**{name: getattr(self, name) for name in File.model_fields})


class FileCatalog:
    """The files in a store."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def receive(
        self, format: FileFormat, *, owner: str | None, idempotency_key: str | None
    ) -> Upload:
        """Begin an upload. The same key of the same owner gives the same file."""
        return Upload(self._store, ids.make("file", owner, idempotency_key), format, owner)

    def get(self, file_id: str, *, owner: str | None) -> File:
        """What is known of a file; owner None sees everybody's.

        Raises: UnknownFileError if there is none, or it is another owner's.
        """
        record = self._record(file_id)
        if owner is not None and record.owner != owner:
            raise _unknown(file_id)
        return record.public()

    def open(self, file_id: str) -> BinaryIO:
        """The bytes of a file. Raises: UnknownFileError."""
        return self._store.open(_data_key(file_id, self._record(file_id).sha256))

    def all(self) -> Iterator[File]:
        """Every file that there is."""
        for folder in self._store.list("files"):
            with suppress(UnknownFileError):
                yield self.get(folder.rsplit("/", 1)[-1], owner=None)

    def delete(self, file_id: str) -> None:
        """Remove a file; what is known of it goes last, so that a second try ends a broken one.

        Raises: UnknownFileError.
        """
        self._store.delete(_data_key(file_id, self._record(file_id).sha256))
        self._store.delete_folder(f"files/{file_id}")

    def _record(self, file_id: str) -> FileRecord:
        if not ids.is_valid("file", file_id):
            raise _unknown(file_id)
        try:
            return FileRecord.model_validate_json(self._store.read(_record_key(file_id)))
        except BlobNotFoundError as error:
            raise _unknown(file_id) from error


class Upload:
    """A file that is coming in; not there before `commit`."""

    def __init__(
        self, store: BlobStore, file_id: str, format: FileFormat, owner: str | None
    ) -> None:
        self._store = store
        self._id = file_id
        self._format: FileFormat = format
        self._owner = owner
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._draft = store.draft("the upload")

    def write(self, chunk: bytes) -> None:
        """Append bytes."""
        self._draft.write(chunk)
        self._digest.update(chunk)
        self._bytes += len(chunk)

    def commit(self, sha256: str | None = None) -> File:
        """Keep the file.

        Args:
            sha256: what its checksum has to be, in hex; None for whatever it is.
        Raises: DigestMismatchError; IdempotencyConflictError if its idempotency key named other
        bytes before.
        """
        if sha256 is not None and sha256 != self._digest.hexdigest():
            raise DigestMismatchError(
                f"{self._bytes:,} bytes came in, and not with the checksum that was given: "
                "nothing was kept, send the file again"
            )
        record = FileRecord(
            id=self._id,
            format=self._format,
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            created_at=datetime.now(UTC),
            owner=self._owner,
        )
        self._draft.publish(_data_key(record.id, record.sha256))
        with self._store.create(_record_key(record.id)) as blob:
            blob.write(record.model_dump_json().encode())
        if blob.published:
            return record.public()
        known = FileRecord.model_validate_json(self._store.read(_record_key(record.id)))
        if (known.sha256, known.format) != (record.sha256, record.format):
            raise IdempotencyConflictError(
                "this Idempotency-Key was used for another file: send a new one"
            )
        return known.public()

    def abort(self) -> None:
        """Drop what came; a no-op after commit."""
        self._draft.abort()


def _record_key(file_id: str) -> str:
    return f"files/{file_id}/file.json"


def _data_key(file_id: str, sha256: str) -> str:
    # Named by its content: uploads under one idempotency key cannot mix theirs.
    return f"files/{file_id}/{sha256}"


def _unknown(file_id: str) -> UnknownFileError:
    return UnknownFileError(f"there is no file {file_id[:64]!r}")
