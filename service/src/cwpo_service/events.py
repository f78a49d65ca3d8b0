"""The progress of a job as server-sent events, which a client can take up where it left off."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from cwpo.types import FINAL_STATES, Job
from cwpo_service.service import Service
from cwpo_worker.ledger import Ledger

_POLL_SECONDS = 0.5
_POLLS_A_HEARTBEAT = 30
_PLACE = re.compile(r"(\d{1,18})\.(\d{1,18})")


class Place(NamedTuple):
    """How far a job is: changes of its record, then rows done. A later event's is the greater."""

    version: int
    rows_done: int

    @classmethod
    def parse(cls, event_id: str | None) -> Place | None:
        """The place of a Last-Event-ID, None where no event of ours had it."""
        match = None if event_id is None else _PLACE.fullmatch(event_id)
        return None if match is None else cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.version}.{self.rows_done}"


class Sight(NamedTuple):
    """A job at one moment."""

    place: Place
    job: Job

    @property
    def has_ended(self) -> bool:
        """Whether nothing comes after it, unless the job is resumed."""
        return self.job.state in FINAL_STATES

    def event(self) -> str:
        """It as an event."""
        return f"id: {self.place}\nevent: job\ndata: {self.job.model_dump_json()}\n\n"


async def look(ledger: Ledger, job_id: str, owner: str | None) -> Sight:
    """The job as it stands. Raises: as Ledger.get does."""
    version, job = await run_in_threadpool(ledger.versioned, job_id, owner=owner)
    return Sight(Place(version, job.progress.rows_done), job)


async def stream(
    service: Service, ledger: Ledger, sight: Sight, owner: str | None, seen: Place | None
) -> AsyncIterator[str]:
    """The sight, if the client has not seen it, then one for every step that the job takes."""
    polls = 0
    while True:
        if seen is None or sight.place > seen:
            seen = sight.place
            yield sight.event()
        elif polls % _POLLS_A_HEARTBEAT == 0:
            # A comment: proxies cut connections that are silent for long.
            yield ": still here\n\n"
        if sight.has_ended or service.inference.phase == "draining":
            return
        await asyncio.sleep(_POLL_SECONDS)
        polls += 1
        sight = await look(ledger, sight.job.id, owner)
