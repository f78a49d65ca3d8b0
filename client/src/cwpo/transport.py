"""The HTTP protocol of the service, without sockets: requests, answers, errors and retries.

`connection` does the sending and waiting, with and without asyncio.
"""

from __future__ import annotations

import random
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cwpo.errors import (
    APIError,
    ConnectionFailedError,
    CwpoError,
    NoAnswerInTimeError,
    api_error,
    first_line,
)
from cwpo.types import Problem

M = TypeVar("M", bound=BaseModel)

MAX_DELAY_SECONDS = 30.0
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-")


class ClientSettings(BaseSettings):
    """The service's URL and the API key, from CWPO_URL and CWPO_API_KEY."""

    model_config = SettingsConfigDict(env_prefix="CWPO_")

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None


@dataclass(frozen=True)
class Request:
    """A request, which is the same at every retry, including its Idempotency-Key if it has one.

    The content is `body` as JSON (bytes are JSON already), or that of `file`, which is read again
    at every retry. A `path` that is a whole URL is asked without the API key, which is for the
    service alone.
    """

    method: str
    path: str
    body: BaseModel | bytes | None = field(default=None, kw_only=True)
    file: Path | None = field(default=None, kw_only=True)
    params: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    headers: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def arguments(self, content: Any = None) -> dict[str, Any]:
        """The keyword arguments of httpx2's `request` and `stream`.

        content: of the file, as whoever sends it reads files.
        """
        arguments: dict[str, Any] = {
            "method": self.method,
            "url": self.path,
            "params": {key: value for key, value in self.params.items() if value is not None},
            "headers": dict(self.headers),
            "content": content,
        }
        if "://" in self.path:
            arguments["auth"] = _without_key
        if self.body is not None:
            arguments["headers"]["Content-Type"] = "application/json"
            arguments["content"] = self.body
            if isinstance(self.body, BaseModel):
                # Without defaults: an older service refuses the fields that it does not know.
                arguments["content"] = self.body.model_dump_json(exclude_defaults=True)
        return arguments

    def starting_at(self, start: int) -> Request:
        """The request for a file, from this byte on."""
        # A range of compressed bytes would be of no use.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        return replace(self, headers={**self.headers, **headers})


@dataclass(frozen=True)
class Call(Request, Generic[M]):
    """A request, and the type of its answer."""

    answer: type[M]

    def parse(self, response: httpx2.Response) -> M:
        """Read the answer. Raises: CwpoError if it does not match the contract."""
        try:
            return self.answer.model_validate_json(response.content)
        except ValidationError as error:
            raise CwpoError(
                f"the answer to {self.method} {self.path} is not a valid {self.answer.__name__} "
                f"({error.error_count()} mismatches): is {response.request.url.host}:"
                f"{response.request.url.port} a cwpo service of this version?"
            ) from error


class Retries:
    """Decides when a request is retried: a few times, after failures that are worth it.

    Args:
        limit: maximum number of consecutive retries.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._failures = 0

    def delay(self, error: CwpoError) -> float:
        """Seconds to wait before the next attempt: Retry-After, if the service sent it.

        Otherwise a time that doubles with each consecutive failure, less a random part of up to a
        half. Raises: the error itself, if it is not worth a retry or no retries are left.
        """
        if self._failures >= self._limit or not error.is_worth_retrying:
            raise error
        longest = min(0.25 * 2.0**self._failures, MAX_DELAY_SECONDS)
        self._failures += 1
        if isinstance(error, APIError) and error.retry_after is not None:
            return min(max(error.retry_after, 0.0), MAX_DELAY_SECONDS)
        return random.uniform(0.5, 1.0) * longest  # noqa: S311

    def succeeded(self) -> None:
        """Reset the count of failures after a success."""
        self._failures = 0


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request."""
    result = {"Accept": "application/json", "User-Agent": f"cwpo-python/{version('cwpo')}"}
    if api_key:
        result["Authorization"] = f"Bearer {api_key}"
    return result


def first_byte(response: httpx2.Response) -> int:
    """The place in the file at which the answer begins, which need not be the one asked for."""
    found = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
    return int(found[1]) if found else 0


def repr_sha256(response: httpx2.Response) -> str | None:
    """The SHA-256 of the whole file, in hex, where its Repr-Digest (RFC 9530) is stated."""
    found = _SHA256.search(response.headers.get("repr-digest", ""))
    return b64decode(found[1]).hex() if found else None


def error_of(response: httpx2.Response) -> APIError:
    """The exception for an error answer whose body has been read."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        problem = Problem(
            title=response.reason_phrase or "error",
            status=response.status_code,
            detail=response.text[:200] or "the server gave no reason",
        )
    retry_after = _retry_after(response.headers.get("retry-after"))
    return api_error(problem, response.headers.get("x-request-id"), retry_after)


def _retry_after(given: str | None) -> float | None:
    """The seconds of a header, which may also be a date; None for what is neither."""
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None


@contextmanager
def connection_errors(url: str, timeout: float) -> Iterator[None]:
    """Convert every failure to reach the service to a ConnectionFailedError of one line."""
    try:
        yield
    except (httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.PoolTimeout) as error:
        raise NoAnswerInTimeError(
            f"no answer from {url} within {timeout:g} s: send less at a time (batch_size), or wait "
            "for longer (timeout)"
        ) from error
    except httpx2.TransportError as error:
        raise ConnectionFailedError(
            f"no answer from {url} ({first_line(error)}): is the service running there? "
            "Start one with `cwpo up`, or set --url or CWPO_URL"
        ) from error


def _without_key(request: httpx2.Request) -> httpx2.Request:
    request.headers.pop("Authorization", None)
    return request
