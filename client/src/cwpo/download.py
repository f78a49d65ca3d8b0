"""A file that is received in pieces, decided without a socket."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import BinaryIO

import httpx2

from cwpo.errors import CwpoError, DamagedDownloadError
from cwpo.partial_file import ResumableFile
from cwpo.transport import Request, Retries, first_byte, repr_sha256


class Download:
    """A file of known content, received over any number of connections.

    While there is a `request()`, send it, and write its answer to the file that `receiving` opens.
    If either fails, wait `delay(error)` seconds before the next one.

    Args:
        sources: requests for the same content; each is given up for the next one when it fails.
        file: the file, of which a part may be there already.
        limit: number of times that the last source may fail and be asked again.
    """

    def __init__(self, sources: Sequence[Request], file: ResumableFile, limit: int) -> None:
        self._sources = list(sources)
        self._file = file
        self._retries = Retries(limit)

    def request(self) -> Request | None:
        """The request for the bytes that are missing; None if the file is complete."""
        if self._file.is_received:
            # The connection, or an earlier run, ended between the last byte and the check.
            with suppress(DamagedDownloadError):
                self._file.publish()
        if self._file.is_complete():
            return None
        return self._sources[0].starting_at(self._file.received)

    @contextmanager
    def receiving(self, response: httpx2.Response) -> Iterator[BinaryIO]:
        """The file to write the answer to, which is checked and gets its name after the block.

        Raises: DamagedDownloadError, having discarded the file, if its content is wrong.
        """
        with self._file.receiving(first_byte(response)) as out:
            yield out
        self._file.publish()

    def delay(self, error: CwpoError) -> float:
        """Seconds to wait after a failure: none if there is another source, which is asked next.

        Raises: the error itself, if no source is left, and it is permanent or no retries are left.
        """
        if len(self._sources) > 1:
            del self._sources[0]
            return 0.0
        return self._retries.delay(error)


class Saving:
    """A file of which nothing is known before, received over any number of connections.

    Send the `request()`, tell `begin` of its answer, write that, and `check` it. If anything fails,
    wait `delay(error)` seconds and send the next request, which goes on where the last one ended if
    the file is still the same (its ETag).

    Args:
        source: the request for the whole file.
        out: where it is written, a file that has a name.
        limit: number of times that it may fail without a new byte.
    """

    def __init__(self, source: Request, out: BinaryIO, limit: int) -> None:
        self._source = source
        self._out = out
        self._retries = Retries(limit)
        self._etag: str | None = None
        self._sha256: str | None = None
        self._received = 0

    def request(self) -> Request:
        """The request for the bytes that are missing."""
        if self._etag is None:
            return self._source.starting_at(0)
        asked = self._source.starting_at(self._out.tell())
        # Of another file the answer is the whole.
        return replace(asked, headers={**asked.headers, "If-Range": self._etag})

    def begin(self, response: httpx2.Response) -> int | None:
        """Prepare to write the answer; returns how many bytes the whole file has, if it is told."""
        start = first_byte(response)
        self._out.seek(start)
        self._out.truncate()
        self._etag = response.headers.get("etag")
        self._sha256 = repr_sha256(response)
        length = response.headers.get("content-length")
        return None if length is None else start + int(length)

    def check(self) -> None:
        """Compare what was written with the checksum of the answer, where it has one.

        Raises: DamagedDownloadError, having discarded what was written.
        """
        if self._sha256 is None:
            return
        self._out.flush()
        with open(self._out.name, "rb") as written:
            if hashlib.file_digest(written, "sha256").hexdigest() == self._sha256:
                return
        # What comes from now on is no progress, with which the retries would begin anew.
        self._received = self._out.tell()
        self._out.seek(0)
        self._out.truncate()
        self._etag = None
        raise DamagedDownloadError(
            f"{self._source.path}: what was received does not have the checksum that was announced"
        )

    def delay(self, error: CwpoError) -> float:
        """Seconds to wait after a failure. Raises: the error itself, as Retries.delay does."""
        if self._out.tell() > self._received:
            self._received = self._out.tell()
            self._retries.succeeded()
        return self._retries.delay(error)
