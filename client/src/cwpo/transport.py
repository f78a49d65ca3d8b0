"""What the sync and async clients share: settings, calls, retries and error answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cwpo.errors import APIError, ConnectionFailedError, CwpoError, api_error
from cwpo.types import Problem

M = TypeVar("M", bound=BaseModel)

MAX_DELAY_SECONDS = 30.0
_RETRYABLE_STATUS = frozenset({429, 502, 503, 504})


class ClientSettings(BaseSettings):
    """Where the service is and who asks: CWPO_URL and CWPO_API_KEY."""

    model_config = SettingsConfigDict(env_prefix="CWPO_")

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None


@dataclass(frozen=True)
class Call(Generic[M]):
    """One request and the type of its answer."""

    method: str
    path: str
    answer: type[M]
    body: BaseModel | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of httpx's `request`."""
        headers = dict(self.headers)
        content = None
        if self.body is not None:
            headers["Content-Type"] = "application/json"
            content = self.body.model_dump_json(exclude_none=True)
        params = {key: value for key, value in self.params.items() if value is not None}
        return {
            "method": self.method,
            "url": self.path,
            "content": content,
            "params": params,
            "headers": headers,
        }

    def parse(self, response: httpx.Response) -> M:
        """Read the answer. Raises: CwpoError where it is not what the contract says."""
        try:
            return self.answer.model_validate_json(response.content)
        except ValidationError as error:
            raise CwpoError(
                f"{self.method} {self.path} answered something other than {self.answer.__name__}: "
                f"is {response.request.url.host}:{response.request.url.port} a cwpo service of "
                f"this version? ({error.error_count()} mismatches)"
            ) from error


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request."""
    result = {"Accept": "application/json", "User-Agent": "cwpo-python/0.1.0"}
    if api_key:
        result["Authorization"] = f"Bearer {api_key}"
    return result


def is_retryable(response: httpx.Response) -> bool:
    """Whether the same request may succeed later."""
    return response.status_code in _RETRYABLE_STATUS


def is_passing(error: CwpoError) -> bool:
    """Whether the service may do later what it just failed to do."""
    if isinstance(error, APIError):
        return error.status in _RETRYABLE_STATUS
    return isinstance(error, ConnectionFailedError)


def retry_delay(attempt: int, response: httpx.Response | None) -> float:
    """Seconds to wait before retry `attempt` (0 is the first).

    The server's Retry-After where it sent one, otherwise exponential with full jitter.
    """
    if response is not None:
        try:
            asked = float(response.headers["retry-after"])
        except (KeyError, ValueError):
            pass
        else:
            return min(max(asked, 0.0), MAX_DELAY_SECONDS)
    return random.uniform(0.5, 1.0) * min(0.25 * 2.0**attempt, MAX_DELAY_SECONDS)  # noqa: S311


def error_of(response: httpx.Response) -> APIError:
    """The exception for an error answer whose body has been read."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        problem = Problem(
            title=response.reason_phrase or "error",
            status=response.status_code,
            detail=response.text[:200] or "the server gave no reason",
        )
    return api_error(problem, response.headers.get("x-request-id"))


def connection_failed(url: str, error: httpx.TransportError) -> ConnectionFailedError:
    """One line for a service that does not answer."""
    reason = str(error) or type(error).__name__
    return ConnectionFailedError(
        f"no answer from {url} ({reason}): is the service running there? "
        "Start one with `cwpo up`, or set --url or CWPO_URL"
    )
