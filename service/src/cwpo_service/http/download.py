"""Streams a stored file, or a range of its bytes, as a response."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import BinaryIO

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from cwpo_service.problems import ProblemError
from cwpo_worker.storage.store import StoredBlob

_CHUNK = 1 << 20
# Nineteen digits name any byte of any file; longer numbers are none of HTTP's ranges.
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)


def file_response(request: Request, blob: StoredBlob, *, name: str, media_type: str) -> Response:
    """A response with the whole file, or with the range of bytes that the request asks for.

    The ETag identifies the content: a resumed job has other results under the same name. Where the
    checksum of the whole file is known, Repr-Digest (RFC 9530) has it, also beside a range.
    Args:
        blob: the opened file, which the response closes.
        name: file name for the client.
    Raises: ProblemError, 416 for a range outside the file.
    """
    stream, size, version, checksum = blob
    etag = f'"{sha256(version.encode()).hexdigest()[:32]}"'
    wanted = request.headers.get("range")
    if request.headers.get("if-range", etag) != etag:
        wanted = None
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    if checksum is not None:
        headers["Repr-Digest"] = f"sha-256=:{b64encode(bytes.fromhex(checksum)).decode()}:"
    try:
        part = _span(wanted, size) if wanted else None
    except ProblemError:
        stream.close()
        raise
    start, stop = part or (0, size)
    headers["Content-Length"] = str(stop - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return StreamingResponse(
        _chunks(stream, start, stop),
        status_code=206 if part else 200,
        headers=headers,
        media_type=media_type,
    )


def _span(header: str, size: int) -> tuple[int, int] | None:
    """The start and stop (exclusive) of a Range header; None if it asks for the whole file."""
    found = _RANGE.fullmatch(header.strip())
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    else:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        raise ProblemError(
            416,
            f"the range {header} lies outside the file of {size} bytes",
            reason="invalid",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop


async def _chunks(stream: BinaryIO, start: int, stop: int) -> AsyncIterator[bytes]:
    try:
        await run_in_threadpool(stream.seek, start)
        while start < stop:
            chunk = await run_in_threadpool(stream.read, min(_CHUNK, stop - start))
            if not chunk:
                raise OSError("the stored file is shorter than its recorded size")
            start += len(chunk)
            yield chunk
    finally:
        await run_in_threadpool(stream.close)
