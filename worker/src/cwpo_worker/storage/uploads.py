"""Uploaded files: their bytes, and a record of format, size, checksum and owner."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import BinaryIO

from pydantic import ValidationError

from cwpo.errors import CwpoError
from cwpo.types import File, FileFormat
from cwpo_worker import ids
from cwpo_worker.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    FileQuotaError,
    IdempotencyConflictError,
    StoreError,
    UnknownFileError,
)
from cwpo_worker.storage.store import BlobStore

# How often an upload looks at the free space of its disk.
_STRIDE_BYTES = 8 << 20


class FileRecord(File):
    """The record of a file.

    owner: name of the API key that uploaded it; None if the service has no keys.
    """

    owner: str | None = None

    def public(self) -> File:
        """The file as the REST contract shows it."""
        return File(**{name: getattr(self, name) for name in File.model_fields})


class FileCatalog:
    """The files in a store.

    Args:
        max_bytes: maximum total size of the files of each owner; None for no limit.
    """

    def __init__(self, store: BlobStore, max_bytes: int | None = None) -> None:
        self._store = store
        self._max_bytes = max_bytes

    def receive(
        self,
        format: FileFormat,
        *,
        owner: str | None,
        idempotency_key: str | None,
        size: int | None = None,
    ) -> Upload:
        """Begin an upload. The same idempotency key of the same owner gives the same file.

        Args:
            size: number of bytes that will follow, if it is known.
        Raises: FileQuotaError and StoreFullError if that many are too many.
        """
        file_id = ids.make("file", owner, idempotency_key)
        room = None if owner is None else self._room(owner, file_id)
        upload = Upload(self._store, file_id, format, owner, room)
        try:
            upload.expect(size or 0)
        except CwpoError:
            upload.abort()
            raise
        return upload

    def _room(self, owner: str, file_id: str) -> int | None:
        """How many bytes a file of the owner may have; None for any number."""
        if self._max_bytes is None:
            return None
        sizes = (key.rsplit("/", 1)[-1].split(".") for key in self._store.list(_sizes(owner)))
        # What was uploaded under the same idempotency key is the same file.
        return self._max_bytes - sum(int(size) for known, size in sizes if known != file_id)

    def get(self, file_id: str, *, owner: str | None) -> File:
        """The record of a file; owner None has access to all files.

        Raises: UnknownFileError if there is none, or it belongs to another owner.
        """
        record = self._record(file_id)
        if owner is not None and record.owner != owner:
            raise _unknown(file_id)
        return record.public()

    def open(self, file_id: str) -> BinaryIO:
        """The bytes of a file. Raises: UnknownFileError."""
        return self._store.open(_data_key(file_id, self._record(file_id).sha256))

    def all(self) -> Iterator[File]:
        """All files."""
        for folder in self._store.list("files"):
            with suppress(UnknownFileError):
                yield self.get(folder.rsplit("/", 1)[-1], owner=None)

    def delete(self, file_id: str) -> None:
        """Remove a file; its record goes last, so that an interrupted deletion can be repeated.

        Raises: UnknownFileError.
        """
        record = self._record(file_id)
        self._store.delete(_data_key(file_id, record.sha256))
        if record.owner is not None:
            self._store.delete(_size_key(record))
        self._store.delete_folder(f"files/{file_id}")

    def _record(self, file_id: str) -> FileRecord:
        if not ids.is_valid("file", file_id):
            raise _unknown(file_id)
        try:
            return FileRecord.model_validate_json(self._store.read(_record_key(file_id)))
        except BlobNotFoundError as error:
            raise _unknown(file_id) from error


class Upload:
    """A file that is being received; it exists only after `commit`.

    Args:
        room: maximum number of bytes; None for no limit.
    """

    def __init__(
        self,
        store: BlobStore,
        file_id: str,
        format: FileFormat,
        owner: str | None,
        room: int | None = None,
    ) -> None:
        self._store = store
        self._id = file_id
        self._format: FileFormat = format
        self._owner = owner
        self._room = room
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._draft = store.draft("the upload")

    def expect(self, size: int) -> None:
        """Raises: FileQuotaError or StoreFullError if so many more bytes are too many."""
        if self._room is not None and self._bytes + size > self._room:
            raise FileQuotaError(
                f"the file would have at least {self._bytes + size:,} bytes, and the API key "
                f"{self._owner} may store {max(self._room, 0):,} more: delete files of it"
            )
        self._store.check_space(size)

    def write(self, chunk: bytes) -> None:
        """Append bytes. Raises: FileQuotaError; StoreFullError; StoreError."""
        is_over = self._room is not None and self._bytes + len(chunk) > self._room
        if is_over or self._bytes // _STRIDE_BYTES < (self._bytes + len(chunk)) // _STRIDE_BYTES:
            self.expect(len(chunk))
        self._draft.write(chunk)
        self._digest.update(chunk)
        self._bytes += len(chunk)

    def commit(self, sha256: str | None = None) -> File:
        """Keep the file.

        Args:
            sha256: expected checksum in hex; None accepts any.
        Raises: DigestMismatchError; IdempotencyConflictError if its idempotency key was used for
        other bytes before.
        """
        if sha256 is not None and sha256 != self._digest.hexdigest():
            raise DigestMismatchError(
                f"the {self._bytes:,} bytes that were received do not have the checksum that was "
                "given: nothing was stored, send the file again"
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
        if not blob.published:
            known = FileRecord.model_validate_json(self._store.read(_record_key(record.id)))
            if (known.sha256, known.format) != (record.sha256, record.format):
                raise IdempotencyConflictError(
                    "this Idempotency-Key was used for another file: send a new one"
                )
            record = known
        elif not self._store.exists(_data_key(record.id, record.sha256)):
            # An earlier try had left these bytes, and they were collected at this very moment.
            self._store.delete(_record_key(record.id))
            raise StoreError("the file was not stored: send it again")
        if record.owner is not None:
            self._store.put(_size_key(record), b"")
        return record.public()

    def abort(self) -> None:
        """Discard the upload; does nothing after commit."""
        self._draft.abort()


def recorded_blobs(store: BlobStore, folder: str) -> set[str]:
    """The keys in the folder of a file that belong to its record; none if it has no record.

    Of a record that cannot be read nobody knows: all keys belong to it.
    """
    file_id = folder.rsplit("/", 1)[-1]
    try:
        record = FileRecord.model_validate_json(store.read(_record_key(file_id)))
    except BlobNotFoundError:
        return set()
    except ValidationError:
        return set(store.list(folder))
    return {_record_key(file_id), _data_key(file_id, record.sha256)}


def _record_key(file_id: str) -> str:
    return f"files/{file_id}/file.json"


def _data_key(file_id: str, sha256: str) -> str:
    # Named by its content: uploads under one idempotency key cannot mix theirs.
    return f"files/{file_id}/{sha256}"


def _sizes(owner: str) -> str:
    """The folder with an empty blob for each of the owner's files, named by id and size.

    One listing of it gives the size of all files, without reading their records.
    """
    return f"owners/_{owner}/files"


def _size_key(record: FileRecord) -> str:
    return f"{_sizes(record.owner or '')}/{record.id}.{record.bytes}"


def _unknown(file_id: str) -> UnknownFileError:
    return UnknownFileError(f"there is no file {file_id[:64]!r}")
