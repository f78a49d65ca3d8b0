"""The blob store: whole files under keys, in a local folder or an object store."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cwpo.errors import first_line
from cwpo_worker.errors import BlobNotFoundError, StoreError, StoreFullError

PARTIAL_FOLDER = ".partial"
STALE_SECONDS = 24 * 3600
# How much of a remote blob is in memory at a time: drivers would take 50 MB, tenfold in uploads.
BLOCK_BYTES = 8 << 20
_UPLOADS_AT_ONCE = 4
# What uploads leave free on a disk, so that records, parts and results can still be written.
RESERVED_BYTES = 256 << 20
RESERVED_SHARE = 0.05
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class StoredBlob(NamedTuple):
    """An open blob: a seekable stream, its size in bytes, and a text that changes with it.

    sha256: of its content, in hex, where that is known.
    """

    stream: BinaryIO
    size: int
    version: str
    sha256: str | None = None


class BlobStore:
    """Blobs by key, such as `jobs/<id>/results.parquet`.

    Args:
        url: a folder, `file://`, or any URL of fsspec such as `s3://bucket/prefix` (its driver,
            here s3fs, must be installed, and finds its credentials itself).

    A blob appears under its key complete or not at all, and only `put` changes an existing blob. In
    a local folder a file is hard-linked to its key. In an object store a blob is uploaded on the
    condition that the key is free (in S3 by `If-None-Match: *`). Every method raises StoreError,
    with one line that says what cannot be done, and why.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, self._root = self._connect()
        self._pid = os.getpid()
        self._is_local = isinstance(self._filesystem, LocalFileSystem)

    @property
    def _fs(self) -> Any:
        # A driver may have threads of its own, which a forked worker does not inherit.
        if self._pid != os.getpid():
            self._filesystem, _ = self._connect()
            self._pid = os.getpid()
        return self._filesystem

    def _connect(self) -> tuple[Any, str]:
        try:
            # A listing that is cached would hide what other processes have published.
            filesystem, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            driver = "; pip install 'cwpo-worker[s3]'" if self.url.startswith("s3") else ""
            raise StoreError(f"the store {self.url} cannot be used: {error}{driver}") from error
        except ValueError as error:
            raise StoreError(f"the store {self.url} cannot be used: {error}") from error
        return filesystem, root

    @contextmanager
    def create(self, key: str) -> Iterator[Draft]:
        """A new blob to write; it gets its key when the `with` block ends without an error.

        If a blob has that key by then, it stays, and `published` is False.
        """
        draft = self.draft(key)
        try:
            yield draft
            draft.publish(key)
        finally:
            draft.abort()

    def draft(self, name: str) -> Draft:
        """A blob to write that gets its key later; `name` is for messages."""
        with self._errors("write", name):
            handle, partial = tempfile.mkstemp(dir=self._partial_folder())
        return Draft(self, name, handle, partial)

    def check_space(self, size: int) -> None:
        """Raises: StoreFullError if so many more bytes would leave too little of the disk free.

        The disk is that of drafts: that of a local store, or that of temporary files.
        """
        with self._errors("write", "an upload"):
            disk = shutil.disk_usage(self._partial_folder() or tempfile.gettempdir())
        reserved = min(RESERVED_BYTES, int(disk.total * RESERVED_SHARE))
        if disk.free - size < reserved:
            raise StoreFullError(
                f"the disk that uploads are written to has {disk.free / 1e6:,.0f} MB free, of "
                f"which {reserved / 1e6:,.0f} MB are reserved: delete files and jobs, or enlarge it"
            )

    def put(self, key: str, data: bytes) -> None:
        """Write a small blob, replacing any that has the key."""
        draft = self.draft(key)
        try:
            draft.write(data)
            draft.publish(key, replace=True)
        finally:
            draft.abort()

    def open(self, key: str) -> BinaryIO:
        """The blob as a seekable binary stream. Raises: BlobNotFoundError if it does not exist."""
        with self._errors("read", key):
            return readable(self._fs, self._path(key))

    def read(self, key: str) -> bytes:
        """The content of a small blob. Raises: BlobNotFoundError if it does not exist."""
        with self.open(key) as stream, self._errors("read", key):
            return stream.read()

    def exists(self, key: str) -> bool:
        """Whether the blob exists."""
        with self._errors("read", key):
            return bool(self._fs.exists(self._path(key)))

    def stored(self, key: str) -> StoredBlob:
        """The blob with its size and version. Raises: BlobNotFoundError if it does not exist."""
        with self._errors("read", key):
            info = self._fs.info(self._path(key))
            stream = readable(self._fs, self._path(key))
            return StoredBlob(stream, int(info["size"]), version_of(info))

    def signed_url(self, key: str, seconds: int) -> str | None:
        """A URL from which anybody can read the blob for so long; None if the store has no such."""
        with self._errors("sign", key):
            try:
                url: str = self._fs.sign(self._path(key), expiration=seconds)
            except NotImplementedError:
                return None
            return url

    def list(self, prefix: str) -> list[str]:
        """The keys (and folders of keys) directly under the folder `prefix`, sorted."""
        folder = prefix.rstrip("/")
        try:
            with self._errors("read", folder):
                names = self._fs.ls(self._path(folder), detail=False)
        except BlobNotFoundError:
            return []
        return sorted(f"{folder}/{name.rstrip('/').rsplit('/', 1)[-1]}" for name in names)

    def written(self, prefix: str) -> dict[str, float | None]:
        """When each blob below the folder was written, in seconds since 1970.

        None where the store does not tell.
        """
        with self._errors("read", prefix):
            found = self._fs.find(self._path(prefix), detail=True)
        start = len(self._root.rstrip("/")) + 1
        return {name[start:]: _written(info) for name, info in found.items()}

    def delete(self, key: str) -> None:
        """Remove the blob; does nothing if it does not exist."""
        with suppress(BlobNotFoundError), self._errors("delete", key):
            self._fs.rm_file(self._path(key))

    def delete_folder(self, prefix: str) -> None:
        """Remove every blob below the folder; does nothing if there is none."""
        with suppress(BlobNotFoundError), self._errors("delete", prefix):
            self._fs.rm(self._path(prefix), recursive=True)

    def check(self) -> None:
        """Raises: StoreError if the store cannot be written."""
        self.put("check", b"\n")

    def sweep(self) -> None:
        """Remove incomplete files that are at least a day old, from processes that were killed."""
        folder = Path(self._root) / PARTIAL_FOLDER
        if not self._is_local or not folder.is_dir():
            return
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise StoreError(f"{key!r} is not a valid name of a blob")
        return f"{self._root}/{key}"

    def _partial_folder(self) -> str | None:
        """The folder of drafts: inside a local store, since links cannot cross file systems."""
        if not self._is_local:
            return None
        folder = f"{self._root}/{PARTIAL_FOLDER}"
        os.makedirs(folder, exist_ok=True)
        return folder

    def _publish(self, partial: str, path: str, replace: bool) -> bool:
        if not self._is_local:
            return self._upload(partial, path, replace)
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        if replace:
            os.replace(partial, path)
            return True
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        _sync_folder(folder)
        return True

    def _upload(self, partial: str, path: str, replace: bool) -> bool:
        mode = "overwrite" if replace else "create"
        try:
            self._fs.put_file(partial, path, mode=mode, **self._upload_options())
        except FileExistsError:
            return False
        except OSError as error:
            if replace or _s3_code(error) not in ("PreconditionFailed", "412"):
                raise
            return False
        return True

    def _upload_options(self) -> dict[str, int]:
        if "s3" not in self._fs.protocol:
            return {}
        return {"chunksize": 2 * BLOCK_BYTES, "max_concurrency": _UPLOADS_AT_ONCE}

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if verb == "write":  # What is not there is the bucket.
                raise StoreError(f"cannot write {key} in the store {self.url}: {error}") from error
            raise BlobNotFoundError(f"the store {self.url} has no {key}") from error
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise StoreError(f"cannot {verb} {key} in the store {self.url}: {reason}") from error
        except Exception as error:
            # Object stores have their own exceptions for lost connections and credentials.
            if self._is_local or isinstance(error, StoreError):
                raise
            reason = first_line(error)
            raise StoreError(f"cannot {verb} {key} in the store {self.url}: {reason}") from error


class Draft(io.BufferedWriter):
    """A blob being written. `published` is True if it got its key, False if the key was taken."""

    published: bool | None = None

    def __init__(self, store: BlobStore, name: str, handle: int, partial: str) -> None:
        super().__init__(io.FileIO(handle, "wb"), buffer_size=1 << 18)
        self._store = store
        self._name = name
        self._partial = partial

    def write(self, data: Any, /) -> int:
        """Append bytes."""
        with self._store._errors("write", self._name):
            return super().write(data)

    def flush(self) -> None:
        """Pass buffered bytes to the operating system."""
        with self._store._errors("write", self._name):
            super().flush()

    def sha256(self) -> str:
        """The checksum, in hex, of what is written so far."""
        self.flush()
        with self._store._errors("read", self._name), open(self._partial, "rb") as written:
            return hashlib.file_digest(written, "sha256").hexdigest()

    def publish(self, key: str, *, replace: bool = False) -> bool:
        """Publish the blob under its key, unless the key is taken; returns `published`."""
        path = self._store._path(key)
        try:
            with self._store._errors("write", key):
                self.flush()
                os.fsync(self.fileno())
                super().close()
                self.published = self._store._publish(self._partial, path, replace)
        finally:
            self.abort()
        return self.published

    def abort(self) -> None:
        """Discard the draft; does nothing after publish."""
        with suppress(OSError, StoreError):
            # Closing flushes, which fails again on a full disk.
            super().close()
        with suppress(FileNotFoundError):
            os.unlink(self._partial)

    def close(self) -> None:
        """Discard the draft, if it was not published."""
        self.abort()


def readable(filesystem: Any, path: str) -> BinaryIO:
    """A file of any file system as a seekable binary stream that takes little memory."""
    stream: Any = filesystem.open(path, "rb", block_size=BLOCK_BYTES)
    # The files of drivers lack some of what a binary stream can do.
    return stream if isinstance(filesystem, LocalFileSystem) else io.BufferedReader(stream, 1 << 18)


def version_of(info: Mapping[str, Any]) -> str:
    """A text that changes with the content: the size, and the file system's tag or time."""
    changed = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime")
    return f"{info['size']} {changed}"


def _written(info: Mapping[str, Any]) -> float | None:
    """When a file was written; drivers have different names and types for it."""
    for name in ("mtime", "LastModified", "updated", "created"):
        moment = info.get(name)
        if isinstance(moment, datetime):
            return moment.timestamp()
        if isinstance(moment, float):
            return moment
    return None


def _s3_code(error: OSError) -> str | None:
    """S3's name of the error; not every server returns the details that s3fs expects."""
    answer = getattr(error.__cause__, "response", None) or {}
    code: str | None = answer.get("Error", {}).get("Code")
    return code


def _sync_folder(path: str) -> None:
    """Make a new name in the folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
