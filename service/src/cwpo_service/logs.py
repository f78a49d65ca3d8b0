"""Logs in one format, uvicorn's too: a line an event, and never a text that a client sent.

An exception is logged by its type and its stack, since its message could quote a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, Literal

from cwpo_service.journey import Journey

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_access = logging.getLogger("cwpo_service.access")
# Asked every few seconds by machines.
_PROBES = ("/health/", "/metrics")


def configure(format: LogFormat, level: LogLevel) -> None:
    """Send all logs of this process to stderr, in this format, from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("cwpo_service", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # Every warning of a library would be a line of its own making.
    logging.captureWarnings(capture=True)


def access(method: str, route: str, status: int, seconds: float, state: Mapping[str, Any]) -> None:
    """Log an answered request, probes at debug level only.

    Args:
        state: the request's state: its id, the name of its key, and its journey.
    """
    level = logging.DEBUG if is_probe(route) else logging.INFO
    if not _access.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"request_id": state["request_id"]}
    if "key" in state:
        fields["key"] = state["key"]
    fields |= {"method": method, "route": route, "status": status, "seconds": round(seconds, 6)}
    journey: Journey | None = state.get("journey")
    if journey is not None:
        fields |= {"items": journey.items, "tokens": journey.tokens}
        for stage, (begun, ended) in journey.stages.items():
            fields[f"{stage}_seconds"] = round(ended - begun, 6)
    _access.log(level, "answered", extra={"fields": fields})


def is_probe(path: str) -> bool:
    """Whether machines that watch the service ask for it."""
    return path.startswith(_PROBES)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        event = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0]:
            event["exception"] = record.exc_info[0].__name__
            event["stack"] = "".join(traceback.format_tb(record.exc_info[2]))
        return json.dumps(event, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for people: time, level, message, and the fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the stack of an exception below it."""
        fields = getattr(record, "fields", {})
        parts = [_time(record), record.levelname.lower(), record.getMessage()]
        line = " ".join([*parts, *(f"{name}={value}" for name, value in fields.items())])
        if record.exc_info and record.exc_info[0]:
            stack = "".join(traceback.format_tb(record.exc_info[2])).rstrip()
            line += f" ({record.exc_info[0].__name__})\n{stack}"
        return line


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
