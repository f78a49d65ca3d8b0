"""What can go wrong, each with a message that names the place and the fix."""

from __future__ import annotations

from cwpo.types import Problem


class CwpoError(Exception):
    """Base of every error that a user can cause or mend; its message is one clear line."""


class DatasetError(CwpoError):
    """A dataset cannot be read or written as a whole (single bad rows are RejectedRow)."""


class ConfigError(CwpoError):
    """A setting, flag or configuration file is wrong."""


class ConnectionFailedError(CwpoError):
    """The service did not answer."""


class JobFailedError(CwpoError):
    """A job that was waited for ended as failed or cancelled."""


class APIError(CwpoError):
    """The service answered with a problem (RFC 9457)."""

    def __init__(self, problem: Problem, request_id: str | None = None) -> None:
        suffix = f" (request {request_id})" if request_id else ""
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}{suffix}")
        self.problem = problem
        self.status = problem.status
        self.request_id = request_id


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


def api_error(problem: Problem, request_id: str | None = None) -> APIError:
    """The error class that fits the problem's status."""
    return _BY_STATUS.get(problem.status, APIError)(problem, request_id)
