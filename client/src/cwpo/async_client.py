"""The asynchronous SDK client, with the same methods as Client."""

from __future__ import annotations

from copy import copy
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
        max_retries: retries of a request if the service cannot be reached, is busy or fails (408,
            429, 5xx), after the time that it gives in Retry-After, or else after a random time that
            grows.

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
        self._use(connection)

    def with_options(
        self, *, timeout: float | None = None, max_retries: int | None = None
    ) -> AsyncClient:
        """A client with another timeout or number of retries, for a call or several.

        It shares the connections of this one, which is the one to close.

        Example: client.with_options(timeout=5, max_retries=0).annotate(triplets)
        """
        other = copy(self)
        other._use(self._connection.with_options(timeout=timeout, max_retries=max_retries))
        return other

    def _use(self, connection: AsyncConnection) -> None:
        AsyncAnnotations.__init__(self, connection)
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
