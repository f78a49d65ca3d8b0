"""Inputs without upload: files below a prefix that the operator allows jobs to read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter

from cwpo.datasets.triplets import file_format, is_triplet_file
from cwpo.errors import DatasetError
from cwpo.types import MAX_JOB_FILES
from cwpo_worker.errors import InputRefusedError, StoreError, UnknownFileError
from cwpo_worker.storage.store import readable, version_of

# No scheme, no chain of them, no glob, no hidden file, and nothing that leads up or to the root.
_SEGMENT = r"[^./\\:*?\[\]\x00-\x1f][^/\\:*?\[\]\x00-\x1f]*"
_NAME = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")
_CHUNK = 1 << 20
_ASKED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Input:
    """A file below the prefix; `version` shows whether it has changed since a job named it."""

    url: str
    version: str

    @property
    def name(self) -> str:
        """The name of the file for messages, without the prefix."""
        return self.url.rsplit("/", 1)[-1]

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file as a seekable stream.

        Raises: DatasetError if it has changed, also if it changes within the block; StoreError.
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
            version = version_of(filesystem.info(path))
        if version != self.version:
            raise DatasetError(
                f"the input {self.name} has changed since the job was submitted: submit it again"
            )


# Several inputs as JSON.
INPUTS = TypeAdapter(tuple[Input, ...])


class InputPrefix:
    """The folder or URL (`s3://bucket/prefix`) below which jobs may read inputs."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def find(self, name: str) -> Input:
        """The input with this name, a path relative to the prefix.

        Raises: InputRefusedError for a name that could lead out of the prefix; UnknownFileError;
        DatasetError for an unknown format; StoreError.
        """
        _check_name(name)
        file_format(Path(name))
        url = f"{self._url}/{name}"
        with _errors(name):
            filesystem, path = _connect(url)
            if isinstance(filesystem, LocalFileSystem):
                self._check_inside(path)
            info = filesystem.info(path)
            if info["type"] != "file":
                raise UnknownFileError(f"the input {name!r} is not a file")
            return Input(url, version_of(info))

    def find_all(self, folder: str) -> tuple[Input, ...]:
        """The inputs directly in a folder, by name; files of other formats are passed over.

        Raises: UnknownFileError for none; DatasetError for too many; otherwise as find.
        """
        _check_name(folder)
        with _errors(folder):
            filesystem, path = _connect(f"{self._url}/{folder}")
            paths = filesystem.ls(path, detail=False)
        names = sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        inputs = [name for name in names if is_triplet_file(name) and not name.startswith(".")]
        if not inputs:
            raise UnknownFileError(f"there is no .jsonl, .jsonl.gz or .parquet file in {folder!r}")
        if len(inputs) > MAX_JOB_FILES:
            raise DatasetError(
                f"{len(inputs):,} files are in {folder!r}, and a job takes {MAX_JOB_FILES:,}: "
                "split the folder"
            )
        # In an object store each takes a request.
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            return tuple(pool.map(self.find, [f"{folder}/{name}" for name in inputs]))

    def _check_inside(self, path: str) -> None:
        """Raises: InputRefusedError for a link that leads out of the prefix."""
        _, prefix = _connect(self._url)
        root = os.path.realpath(prefix)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise InputRefusedError("the input is a link that leads out of the service's prefix")


def _check_name(name: str) -> None:
    """Raises: InputRefusedError for a name that could lead out of a prefix."""
    if not _NAME.fullmatch(name):
        raise InputRefusedError(
            "name an input by its path below the service's --input-prefix, such as "
            "folder/triplets.jsonl.gz: not a URL, without leading /, .. and hidden files"
        )


def sha256_of(stream: BinaryIO) -> str:
    """The checksum of a seekable stream, which is at its start before and after."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    stream.seek(0)
    return digest.hexdigest()


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
