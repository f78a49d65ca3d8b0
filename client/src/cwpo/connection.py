"""Sends requests and waits between retries, with and without asyncio, as `transport` defines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from copy import copy
from pathlib import Path
from typing import TypeVar
from urllib.request import getproxies

import httpx2
from pydantic import BaseModel

from cwpo import transport
from cwpo.download import Download, Saving
from cwpo.errors import CwpoError
from cwpo.keepalive import KEEPALIVE
from cwpo.partial_file import ResumableFile, partial_file
from cwpo.progress import Progress
from cwpo.transport import Call, Request, Retries

M = TypeVar("M", bound=BaseModel)

_CHUNK_BYTES = 1 << 20


class Connection:
    """The HTTP connection of Client, with the same arguments and errors."""

    def __init__(
        self, url: str | None, api_key: str | None, *, timeout: float, max_retries: int
    ) -> None:
        settings = transport.ClientSettings()
        self.url = url or settings.url
        self.timeout = timeout
        self.max_retries = max_retries
        self._http = httpx2.Client(
            base_url=self.url,
            headers=transport.headers(api_key or settings.api_key),
            transport=None if getproxies() else httpx2.HTTPTransport(socket_options=KEEPALIVE),
        )

    def with_options(self, *, timeout: float | None, max_retries: int | None) -> Connection:
        """Another one with these options, where they are given, over the same sockets."""
        other = copy(self)
        other.timeout = self.timeout if timeout is None else timeout
        other.max_retries = self.max_retries if max_retries is None else max_retries
        return other

    def send(self, call: Call[M], progress: Progress | None = None) -> M:
        """Send the call, with retries after failures that may be temporary; returns the answer.

        progress: shows how many bytes of the call's file were sent.
        """
        retries = Retries(self.max_retries)
        while True:
            try:
                return call.parse(self._answer(call, progress))
            except CwpoError as error:
                seconds = retries.delay(error)
            self.sleep(seconds)

    @contextmanager
    def stream(self, request: Request) -> Iterator[httpx2.Response]:
        """Stream the answer; there are no retries, since part of it may have been read."""
        with (
            transport.connection_errors(self.url, self.timeout),
            self._http.stream(**request.arguments(), timeout=self.timeout) as response,
        ):
            if not response.is_success:
                response.read()
                raise transport.error_of(response)
            yield response

    def save(self, request: Request, path: Path, progress: Progress | None = None) -> Path:
        """Save the answer to a file, which appears under `path` only when it is complete.

        After a lost connection it goes on where it stopped.

        progress: shows how many bytes were received.
        """
        with partial_file(path) as out:
            saving = Saving(request, out, self.max_retries)
            while True:
                try:
                    with self.stream(saving.request()) as response:
                        total = saving.begin(response)
                        for chunk in response.iter_bytes():
                            out.write(chunk)
                            _show(progress, out.tell(), total)
                    saving.check()
                    return path
                except CwpoError as error:
                    seconds = saving.delay(error)
                self.sleep(seconds)

    def fetch(self, sources: Sequence[Request], file: ResumableFile) -> None:
        """Receive a file, of which a part or all may be there already; with retries.

        sources: requests for the same content; each is given up for the next one when it fails.
        """
        download = Download(sources, file, self.max_retries)
        while (request := download.request()) is not None:
            try:
                with self.stream(request) as response, download.receiving(response) as out:
                    for chunk in response.iter_bytes():
                        out.write(chunk)
            except CwpoError as error:
                self.sleep(download.delay(error))

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _answer(self, request: Request, progress: Progress | None) -> httpx2.Response:
        content = None if request.file is None else chunks(request.file, "upload", progress)
        with transport.connection_errors(self.url, self.timeout):
            response = self._http.request(**request.arguments(content), timeout=self.timeout)
        if not response.is_success:
            raise transport.error_of(response)
        return response


class AsyncConnection:
    """The HTTP connection of AsyncClient, with the same arguments and errors."""

    def __init__(
        self, url: str | None, api_key: str | None, *, timeout: float, max_retries: int
    ) -> None:
        settings = transport.ClientSettings()
        self.url = url or settings.url
        self.timeout = timeout
        self.max_retries = max_retries
        self._http = httpx2.AsyncClient(
            base_url=self.url,
            headers=transport.headers(api_key or settings.api_key),
            transport=None if getproxies() else httpx2.AsyncHTTPTransport(socket_options=KEEPALIVE),
        )

    def with_options(self, *, timeout: float | None, max_retries: int | None) -> AsyncConnection:
        """Another one with these options, where they are given, over the same sockets."""
        other = copy(self)
        other.timeout = self.timeout if timeout is None else timeout
        other.max_retries = self.max_retries if max_retries is None else max_retries
        return other

    async def send(self, call: Call[M], progress: Progress | None = None) -> M:
        """Send the call, with retries after failures that may be temporary; returns the answer.

        progress: shows how many bytes of the call's file were sent.
        """
        retries = Retries(self.max_retries)
        while True:
            try:
                return call.parse(await self._answer(call, progress))
            except CwpoError as error:
                seconds = retries.delay(error)
            await self.sleep(seconds)

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncIterator[httpx2.Response]:
        """Stream the answer; there are no retries, since part of it may have been read."""
        with transport.connection_errors(self.url, self.timeout):
            async with self._http.stream(**request.arguments(), timeout=self.timeout) as response:
                if not response.is_success:
                    await response.aread()
                    raise transport.error_of(response)
                yield response

    async def save(self, request: Request, path: Path, progress: Progress | None = None) -> Path:
        """Save the answer to a file, which appears under `path` only when it is complete.

        After a lost connection it goes on where it stopped.

        progress: shows how many bytes were received.
        """
        with partial_file(path) as out:
            saving = Saving(request, out, self.max_retries)
            while True:
                try:
                    async with self.stream(saving.request()) as response:
                        total = saving.begin(response)
                        async for chunk in response.aiter_bytes():
                            out.write(chunk)
                            _show(progress, out.tell(), total)
                    await asyncio.to_thread(saving.check)
                    return path
                except CwpoError as error:
                    seconds = saving.delay(error)
                await self.sleep(seconds)

    async def fetch(self, sources: Sequence[Request], file: ResumableFile) -> None:
        """Receive a file, of which a part or all may be there already; with retries.

        sources: requests for the same content; each is given up for the next one when it fails.
        """
        download = Download(sources, file, self.max_retries)
        while (request := download.request()) is not None:
            try:
                async with self.stream(request) as response:
                    with download.receiving(response) as out:
                        async for chunk in response.aiter_bytes():
                            out.write(chunk)
            except CwpoError as error:
                await self.sleep(download.delay(error))

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _answer(self, request: Request, progress: Progress | None) -> httpx2.Response:
        content = None if request.file is None else _chunks_on_thread(request.file, progress)
        with transport.connection_errors(self.url, self.timeout):
            response = await self._http.request(**request.arguments(content), timeout=self.timeout)
        if not response.is_success:
            raise transport.error_of(response)
        return response


def chunks(path: Path, work: str, progress: Progress | None) -> Iterator[bytes]:
    """Read a file in chunks; `progress` shows how many bytes have been read, as `work`."""
    if progress is not None:
        progress.update(0, total=path.stat().st_size, work=work)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
            if progress is not None:
                progress.advance(len(chunk))


async def _chunks_on_thread(path: Path, progress: Progress | None) -> AsyncIterator[bytes]:
    content = chunks(path, "upload", progress)
    while chunk := await asyncio.to_thread(next, content, b""):
        yield chunk


def _show(progress: Progress | None, done: int, total: int | None) -> None:
    """Show how much of a file has been received."""
    if progress is not None:
        progress.update(done, total=total)
