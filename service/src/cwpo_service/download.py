"""A stored file as an answer: streamed, whole or in part."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import BinaryIO

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from cwpo_service.problems import ProblemError

_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def file_response(
    request: Request, stream: BinaryIO, size: int, *, name: str, media_type: str
) -> Response:
    """The file, or the range of it that the request asks for.

    Files never change once they are there, so the name is the ETag.
    Raises: ProblemError, 416 for a range outside the file.
    """
    etag = f'"{name}"'
    wanted = request.headers.get("range")
    if request.headers.get("if-range", etag) != etag:
        wanted = None
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Content-Disposition": f'attachment; filename="{name}"',
    }
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
    """First byte and the one after the last; None where the header is none that we serve."""
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
                raise OSError("the stored file is shorter than it was")
            start += len(chunk)
            yield chunk
    finally:
        await run_in_threadpool(stream.close)
