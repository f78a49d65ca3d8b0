"""The client side of a load test: keep-alive connections that cost as little as can be.

An HTTP library would be slower than what it measures, and the machine is the server's too;
library_loop is there to show by how much.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2

_END = b"\r\n\r\n"
_LENGTH = b"content-length: "


@dataclass(frozen=True)
class Answer:
    """Status and seconds of one request."""

    status: int
    seconds: float


def request_bytes(body: bytes, path: str = "/annotate") -> bytes:
    """A whole HTTP/1.1 request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answered: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, port: int) -> Connection:
        """A connection to this machine."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_lost(self, error: Exception | None) -> None:
        """Whoever waits learns of it."""
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error or ConnectionResetError("closed by the service"))

    def data_received(self, data: bytes) -> None:
        """Collect until the answer is whole."""
        buffer = self._buffer
        buffer += data
        end = buffer.find(_END)
        if end < 0:
            return
        head = bytes(buffer[:end]).lower()
        at = head.index(_LENGTH) + len(_LENGTH)
        length = int(head[at:].split(b"\r\n", 1)[0])
        if len(buffer) >= end + len(_END) + length and self._answered is not None:
            status = int(buffer[9:12])
            buffer.clear()
            self._answered.set_result(status)

    async def ask(self, request: bytes) -> int:
        """The status of the answer."""
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()


async def closed_loop(
    port: int, request: bytes, *, connections: int, seconds: float
) -> tuple[int, float]:
    """As many requests as come through, each connection asking again at once.

    Returns: requests answered with 200, and the seconds they took.
    """
    links = [await Connection.open(port) for _ in range(connections)]
    begun = time.perf_counter()
    deadline = begun + seconds

    async def asks(link: Connection) -> int:
        count = 0
        while time.perf_counter() < deadline:
            status = await link.ask(request)
            if status != 200:
                raise RuntimeError(f"the answer was {status}")
            count += 1
        return count

    counts = await asyncio.gather(*(asks(link) for link in links))
    took = time.perf_counter() - begun
    for link in links:
        link.close()
    return sum(counts), took


async def library_loop(
    port: int, request: bytes, *, connections: int, seconds: float
) -> tuple[int, float]:
    """Like closed_loop, with the HTTP library of the SDK, which reads each answer's JSON."""
    headers = {"Content-Type": "application/json"}
    body = request.split(_END, 1)[1]
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as http:
        begun = time.perf_counter()

        async def asks() -> int:
            count = 0
            while time.perf_counter() < begun + seconds:
                answer = await http.post("/annotate", content=body)
                answer.raise_for_status().json()
                count += 1
            return count

        counts = await asyncio.gather(*(asks() for _ in range(connections)))
        return sum(counts), time.perf_counter() - begun


async def shared_out(port: int, requests: Sequence[bytes], *, connections: int) -> float:
    """Seconds that all of these requests take, each sent by whichever connection is free."""
    links = [await Connection.open(port) for _ in range(connections)]
    waiting = iter(requests)

    async def asks(link: Connection) -> None:
        for request in waiting:
            status = await link.ask(request)
            if status != 200:
                raise RuntimeError(f"the answer was {status}")

    begun = time.perf_counter()
    await asyncio.gather(*(asks(link) for link in links))
    took = time.perf_counter() - begun
    for link in links:
        link.close()
    return took


async def sequence(port: int, request: bytes, *, requests: int) -> list[float]:
    """Seconds of each of so many requests, one after the other."""
    link = await Connection.open(port)
    seconds = []
    for _ in range(requests):
        begun = time.perf_counter()
        status = await link.ask(request)
        if status != 200:
            raise RuntimeError(f"the answer was {status}")
        seconds.append(time.perf_counter() - begun)
    link.close()
    return seconds


async def open_loop(port: int, request: bytes, arrivals: Sequence[float]) -> list[Answer]:
    """Send a request at each of the arrival times (seconds), whether or not others are answered.

    Seconds of an answer count from its arrival time, so that a late sender hides no waiting.
    """
    idle: list[Connection] = []
    begun = time.perf_counter()

    async def ask(at: float) -> Answer:
        while idle and not idle[-1].is_open:
            idle.pop()
        link = idle.pop() if idle else await Connection.open(port)
        status = await link.ask(request)
        idle.append(link)
        return Answer(status, time.perf_counter() - begun - at)

    tasks = []
    for at in arrivals:
        wait = at - (time.perf_counter() - begun)
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(ask(at)))
    answers = await asyncio.gather(*tasks)
    for link in idle:
        link.close()
    return answers
