"""Server-sent events: the lines of a text/event-stream, put together."""

from __future__ import annotations


class EventReader:
    """Reads one stream of events after the other, each from where the one before broke off."""

    def __init__(self) -> None:
        self._last_id: str | None = None
        self._id: str | None = None
        self._data: list[str] = []

    @property
    def headers(self) -> dict[str, str]:
        """Of the request for what comes next; what a stream left half told is forgotten."""
        self._id, self._data = None, []
        asked = {"Accept": "text/event-stream"}
        return asked if self._last_id is None else {**asked, "Last-Event-ID": self._last_id}

    def feed(self, line: str) -> str | None:
        """Take the next line; the data of the event that it ends, None where it ends none."""
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
