"""Logs of the service and of uvicorn, in one format: one line per event, never a client's text.

Of an exception only the type and the stack are logged, since its message could quote a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

from cwpo_service.settings import LogFormat, LogLevel
from cwpo_service.telemetry.timings import Timings

_access = logging.getLogger("cwpo_service.access")
# Paths that monitoring systems request every few seconds.
_PROBES = ("/health/", "/metrics")


def configure(format: LogFormat, level: LogLevel) -> None:
    """Send all logs of this process at or above this level to stderr, in this format.

    Libraries other than uvicorn log warnings and errors only.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("cwpo_service", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # Otherwise Python would print warnings of libraries in its own format.
    logging.captureWarnings(capture=True)


def access(method: str, route: str, status: int, seconds: float, state: Mapping[str, Any]) -> None:
    """Log an answered request, at level info, or debug for probes.

    Args:
        seconds: time from the request's headers to the end of its answer.
        state: state of the request, with its id, the name of its API key, and its timings.
    """
    level = logging.DEBUG if is_probe(route) else logging.INFO
    if not _access.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"request_id": state["request_id"]}
    if "key" in state:
        fields["key"] = state["key"]
    fields |= {"method": method, "route": route, "status": status, "seconds": round(seconds, 6)}
    timings: Timings | None = state.get("timings")
    if timings is not None:
        fields |= {"items": timings.items, "tokens": timings.tokens}
        for stage, (begun, ended) in timings.stages.items():
            fields[f"{stage}_seconds"] = round(ended - begun, 6)
    _access.log(level, "answered", extra={"fields": fields})


def is_probe(path: str) -> bool:
    """Whether the path belongs to a health probe or the metrics."""
    return path.startswith(_PROBES)


class JsonFormatter(logging.Formatter):
    """Formats an event as one line of JSON: time, level, logger, message, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The event as a line of JSON."""
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
    """Formats an event as text: time, level, message, and its fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The event as a line, followed by the stack if it has an exception."""
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
