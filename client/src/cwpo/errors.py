"""What can go wrong, each with a message that names the place and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from pydantic import ValidationError

from cwpo.types import Problem

# Too many requests, or a service or gateway that cannot answer now.
_TEMPORARY_STATUSES = frozenset({429, 502, 503, 504})
# Not implemented, not this version of HTTP, no room left: the same at the next try.
_PERMANENT_FAILURES = frozenset({501, 505, 507})
# Reasons of conflicts that end by themselves.
_PASSING_CONFLICTS = frozenset({"loading"})


class CwpoError(Exception):
    """Base of every error that a user can cause or mend; its message is one clear line."""

    @property
    def is_temporary(self) -> bool:
        """Whether the same may succeed later, with nothing changed."""
        return False

    @property
    def is_worth_retrying(self) -> bool:
        """Whether the client sends the same request again by itself."""
        return self.is_temporary


class DatasetError(CwpoError):
    """A dataset cannot be read or written as a whole (single bad rows are RejectedRow)."""


class ConfigError(CwpoError):
    """A setting, flag or configuration file is wrong."""


class ConnectionFailedError(CwpoError):
    """The service did not answer."""

    @property
    def is_temporary(self) -> bool:
        """Whether the same may succeed later: yes."""
        return True


class NoAnswerInTimeError(ConnectionFailedError):
    """The service did not answer within the timeout of the client."""


class DamagedDownloadError(CwpoError):
    """A file that was received does not have the checksum that the service announced."""

    @property
    def is_temporary(self) -> bool:
        """Whether the same may succeed later: yes, since what was received is discarded."""
        return True


class JobFailedError(CwpoError):
    """A job that was waited for ended as failed or cancelled."""


class APIError(CwpoError):
    """The service answered with a problem (RFC 9457).

    problem: what it answered.
    status: HTTP status.
    reason: what is wrong, as one word for programs, where the service said so.
    request_id: under which the service's log has the request.
    retry_after: seconds after which the service wants to be asked again, where it said so.
    """

    def __init__(
        self,
        problem: Problem,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        suffix = f" (request {request_id})" if request_id else ""
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}{suffix}")
        self.problem = problem
        self.status = problem.status
        self.reason = problem.reason
        self.request_id = request_id
        self.retry_after = retry_after

    @property
    def is_temporary(self) -> bool:
        """Whether the same may succeed later: for status 429, 502, 503 and 504."""
        return self.status in _TEMPORARY_STATUSES

    @property
    def is_worth_retrying(self) -> bool:
        """Whether the client sends the same request again by itself.

        That is if it is temporary, for 408, for a conflict (409) that ends by itself, and for other
        failures of the service (5xx) unless the annotator failed on this very request.
        """
        passes = self.status == HTTPStatus.CONFLICT and self.reason in _PASSING_CONFLICTS
        is_failure = self.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return (
            self.is_temporary
            or passes
            or self.status == HTTPStatus.REQUEST_TIMEOUT
            or (is_failure and self.status not in _PERMANENT_FAILURES and self.reason != "backend")
        )


class UnauthorizedError(APIError):
    """401 or 403: the API key is missing, unknown or not allowed to do this."""


class NotFoundError(APIError):
    """404: no such job, file or path."""


class ConflictError(APIError):
    """409: the state of the resource does not allow this."""


class TooLargeError(APIError):
    """413: over a limit that the message names."""


class InvalidRequestError(APIError):
    """422: the message names the place in the request."""


class OverloadedError(APIError):
    """429 or 503, still so after all retries."""


class ModelRevisionError(APIError):
    """503: no replica that was asked hosts the revision that the request is pinned to.

    The message names both. The same may succeed later, as during a rolling update.
    """

    def __str__(self) -> str:
        """The message, with what to do."""
        return (
            f"{super().__str__()}: leave the revision out to be answered by the annotator that is "
            "hosted, or wait until the other one is"
        )


class ServiceFailedError(APIError):
    """Another 5xx: the service failed, and its log says why under the request's id."""


_BY_STATUS: dict[int, type[APIError]] = {
    401: UnauthorizedError,
    403: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    413: TooLargeError,
    422: InvalidRequestError,
    429: OverloadedError,
    503: OverloadedError,
}


def api_error(
    problem: Problem, request_id: str | None = None, retry_after: float | None = None
) -> APIError:
    """The error of the class that fits the problem's status and reason."""
    if problem.reason == "model_revision":
        return ModelRevisionError(problem, request_id, retry_after)
    is_failure = problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    kind = _BY_STATUS.get(problem.status, ServiceFailedError if is_failure else APIError)
    return kind(problem, request_id, retry_after)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def mistake_in(error: ValidationError) -> str:
    """What is wrong with data that a model refused, and where: "prompt[0].role: Field required".

    Of several mistakes it is the deepest one: where a value may be of several types, that tells
    which of them was meant. The value itself stays out, since it could be a prompt.
    """
    mistakes = error.errors(include_url=False, include_input=False, include_context=False)
    deepest = max(mistakes, key=lambda mistake: len(mistake["loc"]))
    place = place_in(deepest["loc"])
    return f"{place}: {deepest['msg']}" if place else deepest["msg"]


def place_in(location: Sequence[int | str]) -> str:
    """The location of a mistake as a path: ("triplets", 3, "prompt", "str") is triplets[3].prompt.

    It is empty where the data as a whole is meant.
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        # Pydantic also names the member of a union that it tried; that is no place.
        elif part != "str" and "[" not in part:
            path += f".{part}" if path else part
    return path
