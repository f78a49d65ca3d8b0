"""The tasks that the queue may run: the three steps of a job, and how failures are treated."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus

from rq.job import Retry

from cwpo import Client
from cwpo.errors import (
    APIError,
    ConnectionFailedError,
    DatasetError,
    ModelRevisionError,
    first_line,
)
from cwpo_worker.errors import (
    IncompleteJobError,
    JobStoppedError,
    ModelChangedError,
    OtherModelError,
    UnknownFileError,
    UnknownJobError,
)
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.queue.task_queue import SERVICE_RETRY_SECONDS, Task
from cwpo_worker.steps.annotate import annotate_shard
from cwpo_worker.steps.merge import discard_shards, merge_parts
from cwpo_worker.steps.plan import plan_file
from cwpo_worker.storage.store import BlobStore

# After so long a task gives the shards that it has not begun to others.
RUN_SECONDS = 20.0
# A service that is away is waited for, however long; the last interval repeats.
_WAIT = Retry(max=1_000_000_000, interval=list(SERVICE_RETRY_SECONDS))

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tools:
    """The objects that the tasks of a worker process use, and whether it is about to end.

    model_wait: how long a job waits for a replica that hosts its annotator.
    discard_shards: whether the shards of a job are removed once its dataset is published.
    former: of a service that hosts the annotator of jobs that began before it was changed.
    """

    lifecycle: Lifecycle
    store: BlobStore
    client: Client
    model_wait: timedelta
    discard_shards: bool = False
    former: Client | None = None
    is_ending: bool = False


_tools: ContextVar[Tools] = ContextVar("tools")


def equip(tools: Tools) -> None:
    """Set the tools for the tasks of this process and of its forked children."""
    _tools.set(tools)


def wind_down() -> None:
    """End the task of this process after its current shard; the other shards are returned."""
    _tools.get().is_ending = True


def plan(job_id: str, file: int = 0) -> None:
    """Split a file of the job's input into shards; the plan of the next file is queued then."""
    tools = _tools.get()
    with _verdict(Task(job_id, "plan", file or None)):
        plan_file(tools.lifecycle, tools.store, job_id, file)


def shard(job_id: str, index: int, count: int) -> Retry | None:
    """Annotate shards one by one; returns a Retry if the queue should call this again later."""
    tools = _tools.get()
    task = Task(job_id, "shard", index, count)
    begun = time.monotonic()
    tools.lifecycle.turns.queue_next()  # Its place in the queue is free.
    with _verdict(task):
        try:
            for number in task.shards:
                is_late = time.monotonic() - begun > RUN_SECONDS
                if number > index and (tools.is_ending or is_late or _is_urgent()):
                    tools.lifecycle.give_back(job_id, range(number, index + count))
                    break
                _annotate(tools, job_id, number)
        except (APIError, ConnectionFailedError, OtherModelError) as error:
            _note_wait(tools, task, error)
            log.warning(
                "shard %d of %s waits for the service: %s; it is tried again within %d s",
                *(number, job_id, first_line(error), SERVICE_RETRY_SECONDS[-1]),
            )
            return _WAIT
    return None


def merge(job_id: str) -> None:
    """Publish the parts as the dataset, and merge them; for a cancelled job, those that exist."""
    tools = _tools.get()
    with _verdict(Task(job_id, "merge")):
        merge_parts(tools.lifecycle, tools.store, job_id)
    if tools.discard_shards:
        with _verdict(Task(job_id, "merge")):
            discard_shards(tools.lifecycle, tools.store, job_id)


def _annotate(tools: Tools, job_id: str, number: int) -> None:
    """Annotate a shard, by the former annotator if the job is pinned to that one."""
    try:
        annotate_shard(tools.lifecycle, tools.store, tools.client, job_id, number)
    except (ModelRevisionError, OtherModelError):
        if tools.former is None:
            raise
        annotate_shard(tools.lifecycle, tools.store, tools.former, job_id, number)


def _is_urgent() -> bool:
    """Whether a plan or a merge waits that should not wait for many shards."""
    first = _tools.get().lifecycle.queue.first()
    return first is not None and first.is_urgent


def _note_wait(
    tools: Tools, task: Task, error: APIError | ConnectionFailedError | OtherModelError
) -> None:
    """Record what the task waits for. Raises: the error itself if waiting is of no use."""
    if isinstance(error, ModelRevisionError):
        tools.lifecycle.wait_for_model(task.job_id, error.problem.detail, tools.model_wait)
    elif isinstance(error, OtherModelError):
        tools.lifecycle.wait_for_model(task.job_id, str(error), tools.model_wait)
    elif isinstance(error, APIError) and error.status == HTTPStatus.UNAUTHORIZED:
        # A key that is being rotated is known to the one side before it is to the other.
        tools.lifecycle.note_refused(task)
    elif not error.is_temporary:
        raise error


@contextmanager
def _verdict(task: Task) -> Iterator[None]:
    """Fail the job on errors that a retry would not fix, and end quietly if the job was stopped.

    All other errors are raised: the queue retries the task, and in the end fails the job.
    """
    try:
        yield
    except (JobStoppedError, UnknownJobError) as error:
        log.info("%s of %s is not needed any more: %s", task, task.job_id, error)
    except (DatasetError, ModelChangedError, IncompleteJobError, UnknownFileError) as error:
        log.info("%s of %s cannot be done: the job fails and says why", task, task.job_id)
        _tools.get().lifecycle.give_up(task, str(error))
