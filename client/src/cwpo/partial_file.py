"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cwpo.errors import DamagedDownloadError


@contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is renamed to `path` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as out:
            yield out
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class ResumableFile:
    """A file of known content that is received in pieces, over several runs if need be.

    Until it is complete, what was received is beside it, under a name that begins with a dot.

    Args:
        path: where it belongs, in a folder that exists.
        size: its number of bytes.
        sha256: its checksum, in hex.
    """

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        self.path = path
        self._size = size
        self._sha256 = sha256
        self._partial = path.with_name(f".{path.name}.partial")
        self._is_published = False

    def is_complete(self) -> bool:
        """Whether the file is there with the right content."""
        return self._is_published or (self.path.is_file() and self._is_right(self.path))

    @property
    def received(self) -> int:
        """Number of bytes that are there already."""
        return self._partial.stat().st_size if self._partial.is_file() else 0

    @property
    def is_received(self) -> bool:
        """Whether all bytes are there, though not checked yet."""
        return self._partial.is_file() and self.received >= self._size

    def receiving(self, start: int) -> BinaryIO:
        """The file to write the bytes from `start` on to."""
        out = self._partial.open("ab")
        out.truncate(start)
        return out

    def publish(self) -> None:
        """Give the file its name. Raises: DamagedDownloadError, having discarded what is wrong."""
        if not self._is_right(self._partial):
            self._partial.unlink()
            raise DamagedDownloadError(
                f"{self.path}: what was received does not have the checksum that was announced"
            )
        self._partial.replace(self.path)
        self._is_published = True

    def _is_right(self, path: Path) -> bool:
        if path.stat().st_size != self._size:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == self._sha256
