"""Decompresses a request's body and limits its size while it is read."""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from cwpo_service.problems import ProblemError

# The value of zlib's wbits for gzip with the largest window.
_GZIP = 31
_PIECE = 1 << 20
# Preference data grows about tenfold when it is decompressed. From the second size on, a body that
# grows by more than the first factor is refused.
_MAX_RATIO = 200
_RATIO_FROM_BYTES = 64 << 20


class LimitedBody:
    """A request's body, decompressed if necessary, with a limit on its size.

    Args:
        limit: maximum size of the body in bytes, after decompression.
    """

    def __init__(self, receive: Receive, scope: Scope, limit: int) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self._declared = int(length) if length.isdecimal() else 0
        self._receive = receive
        self._limit = limit
        self._size = 0
        encoding = headers.get("content-encoding", "identity").strip().lower()
        self._encoding = encoding
        self._inflation = Inflation(receive) if encoding == "gzip" else None

    async def receive(self) -> Message:
        """The next ASGI message of the body.

        Raises: ProblemError, 413 if the body exceeds the limit, or grows too much when it is
            decompressed; 415 for an encoding other than gzip; 400 for a body that is not valid
            gzip.
        """
        if self._declared > self._limit:
            raise self._too_large()
        if self._inflation is not None:
            # One byte over the limit tells enough, however far a bomb would go on.
            message = await self._inflation.receive(self._limit - self._size + 1)
        elif self._encoding == "identity":
            message = await self._receive()
        else:
            raise ProblemError(
                415,
                f"send Content-Encoding: gzip or none, not {self._encoding}",
                reason="invalid",
                headers={"Accept-Encoding": "gzip"},
            )
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        return message

    def _too_large(self) -> ProblemError:
        return ProblemError(
            413, f"the body is larger than {self._limit:,} bytes", reason="too_large"
        )


class Inflation:
    """Decompresses a gzipped body in small pieces on a separate thread."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gzip = zlib.decompressobj(_GZIP)
        self._waiting = b""
        self._is_whole = False
        self._bytes_in = 0
        self._bytes_out = 0

    async def receive(self, most: int) -> Message:
        """The next piece, of at most `most` bytes. Raises: ProblemError, 400 or 413."""
        if not self._waiting and not self._is_whole:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._waiting = message.get("body", b"")
            self._is_whole = not message.get("more_body", False)
            self._bytes_in += len(self._waiting)
        most = min(most, _PIECE)
        try:
            piece = await asyncio.to_thread(self._gzip.decompress, self._waiting, most)
        except zlib.error as error:
            raise _no_gzip() from error
        if self._gzip.unused_data:
            raise _no_gzip()
        self._waiting = self._gzip.unconsumed_tail
        self._bytes_out += len(piece)
        if self._bytes_out > max(_RATIO_FROM_BYTES, _MAX_RATIO * self._bytes_in):
            raise ProblemError(
                413,
                f"the body grows by more than {_MAX_RATIO} times: send it uncompressed",
                reason="too_large",
            )
        # zlib may hold more output even if it has read all input.
        has_more = bool(self._waiting) or (len(piece) == most and not self._gzip.eof)
        if self._is_whole and not has_more and not self._gzip.eof:
            raise _no_gzip()
        return {
            "type": "http.request",
            "body": piece,
            "more_body": has_more or not self._is_whole,
        }


def _no_gzip() -> ProblemError:
    return ProblemError(400, "the body is not exactly one valid gzip member", reason="invalid")
