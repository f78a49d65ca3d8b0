"""The synchronous SDK client."""

from __future__ import annotations

from copy import copy
from types import TracebackType

from cwpo.connection import Connection
from cwpo.resources.annotations import Annotations
from cwpo.resources.files import Files
from cwpo.resources.jobs import Jobs


class Client(Annotations):
    """Talks to a cwpo service.

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
        connection = Connection(url, api_key, timeout=timeout, max_retries=max_retries)
        self._use(connection)

    def with_options(
        self, *, timeout: float | None = None, max_retries: int | None = None
    ) -> Client:
        """A client with another timeout or number of retries, for a call or several.

        It shares the connections of this one, which is the one to close.

        Example: client.with_options(timeout=5, max_retries=0).annotate(triplets)
        """
        other = copy(self)
        other._use(self._connection.with_options(timeout=timeout, max_retries=max_retries))
        return other

    def _use(self, connection: Connection) -> None:
        Annotations.__init__(self, connection)
        self.files = Files(connection)
        self.jobs = Jobs(connection)

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._connection.url

    @property
    def max_retries(self) -> int:
        """Retries of a request when the service cannot be reached or is busy."""
        return self._connection.max_retries

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
