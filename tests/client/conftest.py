"""The SDK is tested with and without asyncio."""

import asyncio
import inspect

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
