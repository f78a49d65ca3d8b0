"""Inputs that need no upload: files under a prefix that the operator allows jobs to read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cwpo.datasets import file_format
from cwpo.errors import DatasetError
from cwpo_worker.errors import InputRefusedError, StoreError, UnknownFileError
from cwpo_worker.store import readable

# No scheme, no chain of them, no glob, no hidden file, and nothing that leads up or to the root.
_SEGMENT = r"[^./\\:*?\[\]\x00-\x1f][^/\\:*?\[\]\x00-\x1f]*"
_NAME = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Input:
    """A file under the prefix as it was when a job named it; version tells it from a later one."""

    url: str
    version: str

    @property
    def name(self) -> str:
        """For messages: where the prefix is, is the operator's business."""
        return self.url.rsplit("/", 1)[-1]

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes, seekable.

        Raises: DatasetError if they are others by now, or by the end of the block; StoreError.
        """
        self._check()
        with _errors(self.name):
            filesystem, path = _connect(self.url)
            stream = readable(filesystem, path)
        with stream:
            yield stream
        self._check()

    def _check(self) -> None:
        with _errors(self.name):
            filesystem, path = _connect(self.url)
            version = _version(filesystem.info(path))
        if version != self.version:
            raise DatasetError("the input has changed since the job was submitted: submit it again")


class InputPrefix:
    """The folder or URL (`s3://bucket/prefix`) under which jobs may name inputs."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def find(self, name: str) -> Input:
        """The input of that name, a path relative to the prefix.

        Raises: InputRefusedError for a name that could lead elsewhere; UnknownFileError;
        DatasetError for a name of no known format; StoreError.
        """
        if not _NAME.fullmatch(name):
            raise InputRefusedError(
                "an input is named by its path below the prefix of the service, such as "
                "folder/triplets.jsonl.gz: no URL, no leading /, no .. and no hidden file"
            )
        file_format(Path(name))
        url = f"{self._url}/{name}"
        with _errors(name):
            filesystem, path = _connect(url)
            if isinstance(filesystem, LocalFileSystem):
                self._check_inside(path)
            info = filesystem.info(path)
            if info["type"] != "file":
                raise UnknownFileError(f"the input {name!r} is no file")
            return Input(url, _version(info))

    def _check_inside(self, path: str) -> None:
        """A link below the prefix may lead out of it."""
        _, prefix = _connect(self._url)
        root = os.path.realpath(prefix)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise InputRefusedError("the input is a link that leads out of the service's prefix")


def sha256_of(stream: BinaryIO) -> str:
    """The checksum of a seekable stream, which stands at its beginning before and after."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    stream.seek(0)
    return digest.hexdigest()


def _version(info: dict[str, Any]) -> str:
    """What changes with the bytes: the size, and the tag or time that the file system knows."""
    changed = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime")
    return f"{info['size']} {changed}"


def _connect(url: str) -> tuple[Any, str]:
    filesystem, path = fsspec.url_to_fs(url, use_listings_cache=False)
    return filesystem, path


@contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UnknownFileError(f"there is no input {name!r}") from error
    except (OSError, ImportError, ValueError) as error:
        raise StoreError(f"the input {name!r} cannot be read: {error}") from error
