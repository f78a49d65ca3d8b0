"""What the queue may run: the three steps of a job, with what each kind of failure means."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from rq.job import Retry

from cwpo import Client
from cwpo.errors import APIError, ConnectionFailedError, DatasetError
from cwpo_worker import merge as merging
from cwpo_worker import planner
from cwpo_worker import shard as annotating
from cwpo_worker.errors import (
    IncompleteJobError,
    JobStoppedError,
    ModelChangedError,
    UnknownFileError,
    UnknownJobError,
)
from cwpo_worker.ledger import Ledger
from cwpo_worker.queue import Task

UNAVAILABLE_STATUS = frozenset({429, 502, 503, 504})
# After so long a task gives the shards that it has not begun to others.
RUN_SECONDS = 20.0
# A service that is away is waited for, however long; the last interval repeats.
_WAIT = Retry(max=1_000_000_000, interval=[2, 5, 10, 20, 30])

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tools:
    """What the tasks of a worker process work with, and whether it is about to end."""

    ledger: Ledger
    client: Client
    is_ending: bool = False


_tools: ContextVar[Tools] = ContextVar("tools")


def equip(tools: Tools) -> None:
    """Give the tools to the tasks of this process and of those that it forks."""
    _tools.set(tools)


def wind_down() -> None:
    """Let the task of this process end after the shard at hand, and give back the others."""
    _tools.get().is_ending = True


def plan(job_id: str) -> None:
    """Cut the job's input into shards."""
    with _verdict(Task(job_id, "plan")):
        planner.plan(_tools.get().ledger, job_id)


def shard(job_id: str, index: int, count: int) -> Retry | None:
    """Annotate shards, one after the other; a Retry asks the queue to call again later."""
    tools = _tools.get()
    begun = time.monotonic()
    try:
        with _verdict(Task(job_id, "shard", index, count)):
            for number in range(index, index + count):
                is_late = time.monotonic() - begun > RUN_SECONDS
                if number > index and (tools.is_ending or is_late):
                    left = range(number, index + count)
                    tools.ledger.queue.give_back(Task(job_id, "shard", one) for one in left)
                    break
                annotating.annotate(tools.ledger, tools.client, job_id, number)
    except (APIError, ConnectionFailedError) as error:
        if isinstance(error, APIError) and error.status not in UNAVAILABLE_STATUS:
            raise
        log.warning("shard %d of %s waits for the service: %s", number, job_id, error)
        return _WAIT
    return None


def merge(job_id: str) -> None:
    """Put the parts together into the results, all or those that a cancelled job has."""
    with _verdict(Task(job_id, "merge")):
        merging.merge(_tools.get().ledger, job_id)


@contextmanager
def _verdict(task: Task) -> Iterator[None]:
    """Fail the job for what a second try would not mend, and stop quietly if it was stopped.

    Everything else is raised: the queue tries again, and fails the job in the end.
    """
    try:
        yield
    except (JobStoppedError, UnknownJobError) as error:
        log.info("nothing to do: %s", error)
    except (DatasetError, ModelChangedError, IncompleteJobError, UnknownFileError) as error:
        _tools.get().ledger.give_up(task, str(error))
