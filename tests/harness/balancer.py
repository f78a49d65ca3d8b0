"""What a Service of Kubernetes does: connections to one address go to the ready pods in turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress

import httpx2

_PROBE_SECONDS = 0.5


class Balancer:
    """Listens on an address, and passes connections on.

    ready: the pods whose health port said so last. leaving: those that are being ended.
    """

    def __init__(self, host: str, port: int, pods: Sequence[str], target: int, health: int) -> None:
        self._host, self._port = host, port
        self._pods, self._target, self._health = pods, target, health
        self._turn = 0
        self.ready: list[str] = []
        self.leaving: set[str] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=[self._run()], daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._connected, self._host, self._port)
        async with httpx2.AsyncClient(timeout=3) as http:
            while not self._ending.is_set():
                asked = [self._is_ready(http, pod) for pod in self._pods]
                answers = await asyncio.gather(*asked)
                self.ready = [pod for pod, is_ready in zip(self._pods, answers, strict=True)
                              if is_ready and pod not in self.leaving]  # fmt: skip
                await asyncio.sleep(_PROBE_SECONDS)
        server.close()

    async def _is_ready(self, http: httpx2.AsyncClient, pod: str) -> bool:
        with suppress(httpx2.TransportError):
            answer = await http.get(f"http://{pod}:{self._health}/health/ready")
            return answer.status_code == 200
        return False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.ready:
            writer.transport.abort()  # As a Service without endpoints refuses.
            return
        self._turn += 1
        pod = self.ready[self._turn % len(self.ready)]
        try:
            there = await asyncio.open_connection(pod, self._target)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_copied(reader, there[1]), _copied(there[0], writer))


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()
