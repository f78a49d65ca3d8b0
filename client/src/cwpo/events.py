"""The events of a job (text/event-stream), read without a socket.

Format and reconnection: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from cwpo.errors import ConnectionFailedError, CwpoError
from cwpo.transport import Request, Retries
from cwpo.types import FINAL_STATES, Job


class EventReader:
    """Reads a stream of events, and continues in a new stream where the last one broke off."""

    def __init__(self) -> None:
        self._last_id: str | None = None
        self._id: str | None = None
        self._data: list[str] = []

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the request for the next events; an incomplete event is discarded."""
        self._id, self._data = None, []
        asked = {"Accept": "text/event-stream"}
        return asked if self._last_id is None else {**asked, "Last-Event-ID": self._last_id}

    def feed(self, line: str) -> str | None:
        """Take the next line; returns the data of the event that it completes, or else None."""
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            self._id = value
        elif name == "data":
            self._data.append(value)
        elif not line:
            told = "\n".join(self._data) if self._data else None
            self._last_id = self._id or self._last_id
            self._id, self._data = None, []
            return told
        return None


class JobEvents:
    """The states of a job, as reported by its events over any number of connections.

    For each connection, send `request()` and `feed` every line of the answer until `ended`. If the
    connection ends or fails before, wait `delay(error)` seconds and open the next one.

    Args:
        limit: number of consecutive connections that may fail, or end without an event.
    """

    def __init__(self, job_id: str, limit: int) -> None:
        self._job_id = job_id
        self._reader = EventReader()
        self._retries = Retries(limit)
        self.ended = False

    def request(self) -> Request:
        """The request for the events after those that were received."""
        return Request("GET", f"/jobs/{self._job_id}/events", headers=self._reader.headers)

    def feed(self, line: str) -> Job | None:
        """Take the next line; returns the job if the line completes an event."""
        told = self._reader.feed(line)
        if told is None:
            return None
        self._retries.succeeded()
        job = Job.model_validate_json(told)
        self.ended = job.state in FINAL_STATES
        return job

    def delay(self, error: CwpoError | None) -> float:
        """Seconds to wait before the next connection.

        Args:
            error: failure of the last connection; None if it ended without a failure.
        Raises: CwpoError if the failure is permanent, or too many connections have failed.
        """
        return self._retries.delay(
            error
            or ConnectionFailedError(
                f"the service stopped sending the events of job {self._job_id} before it had ended"
            )
        )
