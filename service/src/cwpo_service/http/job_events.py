"""Streams the progress of a job as server-sent events; a client can resume the stream."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from cwpo.types import FINAL_STATES, Job
from cwpo_worker.jobs.ledger import Ledger

_POLL_SECONDS = 0.5
_POLLS_A_HEARTBEAT = 30
_EVENT_ID = re.compile(r"(\d{1,18})\.(\d{1,18})")


class EventId(NamedTuple):
    """Id of an event: changes of the job's record so far, then rows done; ids only increase."""

    version: int
    rows_done: int

    @classmethod
    def parse(cls, text: str | None) -> EventId | None:
        """The id in a Last-Event-ID header; None if it is missing or malformed."""
        match = None if text is None else _EVENT_ID.fullmatch(text)
        return None if match is None else cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.version}.{self.rows_done}"


class JobEvent(NamedTuple):
    """The state of a job at one moment, with the id of its event."""

    id: EventId
    job: Job

    @property
    def is_last(self) -> bool:
        """Whether the job has ended, so that no event follows unless it is resumed."""
        return self.job.state in FINAL_STATES

    def encode(self) -> str:
        """The event in the format of server-sent events."""
        return f"id: {self.id}\nevent: job\ndata: {self.job.model_dump_json()}\n\n"


async def current_event(ledger: Ledger, job_id: str, owner: str | None) -> JobEvent:
    """The current state of the job. Raises: as Ledger.versioned does."""
    version, job = await run_in_threadpool(ledger.versioned, job_id, owner=owner)
    return JobEvent(EventId(version, job.progress.rows_done), job)


async def stream(
    ledger: Ledger,
    event: JobEvent,
    owner: str | None,
    seen: EventId | None,
    draining: asyncio.Event,
) -> AsyncIterator[str]:
    """Yield the event unless the client has seen it, then one event for every change of the job.

    Args:
        owner: name of the key whose jobs may be read; None for all jobs.
        seen: id of the last event that the client received; None if it received none.
        draining: set when the service shuts down; this ends the stream, and the client reconnects.
    """
    polls = 0
    while True:
        if seen is None or event.id > seen:
            seen = event.id
            yield event.encode()
        elif polls % _POLLS_A_HEARTBEAT == 0:
            # A comment line, since proxies close connections that are silent for long.
            yield ": still here\n\n"
        if event.is_last or draining.is_set():
            return
        await asyncio.sleep(_POLL_SECONDS)
        polls += 1
        event = await current_event(ledger, event.job.id, owner)
