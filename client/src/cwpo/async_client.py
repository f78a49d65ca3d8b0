"""The asynchronous SDK client, with the same methods as Client."""

from __future__ import annotations

from types import TracebackType

from cwpo.connection import AsyncConnection
from cwpo.resources.annotations import AsyncAnnotations
from cwpo.resources.files import AsyncFiles
from cwpo.resources.jobs import AsyncJobs


class AsyncClient(AsyncAnnotations):
    """Talks to a cwpo service from asyncio.

    Args:
        url: address of the service; by default CWPO_URL, else http://127.0.0.1:8000.
        api_key: API key, if the service requires one; by default CWPO_API_KEY, else none.
        timeout: seconds to wait for an answer.
        max_retries: retries of a request when the service cannot be reached or is busy, after the
            time that it gives in Retry-After.

    Every method raises APIError for an error answer, and ConnectionFailedError for no answer.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        max_retries: int = 4,
    ) -> None:
        connection = AsyncConnection(url, api_key, timeout=timeout, max_retries=max_retries)
        super().__init__(connection)
        self.files = AsyncFiles(connection)
        self.jobs = AsyncJobs(connection)

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._connection.url

    @property
    def max_retries(self) -> int:
        """Retries of a request when the service cannot be reached or is busy."""
        return self._connection.max_retries

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
