"""The SDK is tested with and without asyncio, and the command also where nobody reads it."""

import asyncio
import inspect
import os
import subprocess
import sys

import pytest

from cwpo import AsyncClient, Client


@pytest.fixture(params=["sync", "async"])
def use(request):
    """`use(url, lambda client: ...)`: the answer, or what an async client's coroutine gives."""

    def run_sync(url, call, **options):
        with Client(url, **options) as client:
            return call(client)

    def run_async(url, call, **options):
        async def run():
            async with AsyncClient(url, **options) as client:
                result = call(client)
                return await result if inspect.isawaitable(result) else result

        return asyncio.run(run())

    return {"sync": run_sync, "async": run_async}[request.param]


@pytest.fixture
def unread():
    """`unread("--help", stream="stdout")`: `cwpo --help`, whose stream is a pipe without reader."""

    def run(*arguments, stream="stdout", **environment):
        reader, writer = os.pipe()
        os.close(reader)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
        try:
            return subprocess.run(
                [sys.executable, "-m", "cwpo", *map(str, arguments)],
                **streams,
                text=True,
                check=False,
                env={**os.environ, **environment},
            )
        finally:
            os.close(writer)

    return run
