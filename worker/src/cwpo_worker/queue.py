"""The task queue: RQ with JSON instead of pickle, and with an allow-list of what may run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import redis
import rq
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job as QueuedTask
from rq.job import Retry
from rq.serializers import JSONSerializer

from cwpo_worker import activity

Step = Literal["plan", "shard", "merge"]

NAME = "cwpo"
# A task that raises or dies is tried again after these seconds; then its job fails.
RETRY_SECONDS = (1, 1, 2, 2, 5, 5, 15, 30, 60, 60, 60, 60)
TIMEOUT_SECONDS = 6 * 3600
# Between taking a task off the queue and registering it as started lie milliseconds.
LIMBO_SECONDS = 10.0
ALLOWED = frozenset(f"cwpo_worker.tasks.{step}" for step in get_args(Step))
# A task does at most so many shards, and no more than leaves a job so many tasks.
RUN_SHARDS = 8
RUNS = 32
_BATCH = 1000
_TASK_ID = re.compile(
    r"(?P<job>job-[0-9a-f]{24})_(?P<step>plan|shard|merge)(_(?P<index>\d+)(x(?P<count>\d+))?)?"
)


@dataclass(frozen=True, slots=True)
class Task:
    """One step of a job. A shard task does `count` shards, from number `index` on."""

    job_id: str
    step: Step
    index: int | None = None
    count: int = 1

    @property
    def id(self) -> str:
        """Its name in the queue; a task that is queued twice has the same."""
        suffix = "" if self.index is None else f"_{self.index:05d}"
        return f"{self.job_id}_{self.step}{suffix}{self._times}"

    @property
    def shards(self) -> range:
        """The numbers of its shards; none of a plan or a merge."""
        return range(0) if self.index is None else range(self.index, self.index + self.count)

    @classmethod
    def parse(cls, task_id: str) -> Task | None:
        """The task of that id, None where the id is not one of ours."""
        match = _TASK_ID.fullmatch(task_id)
        if match is None:
            return None
        step: Any = match["step"]
        index = None if match["index"] is None else int(match["index"])
        return cls(match["job"], step, index, int(match["count"] or 1))

    def __str__(self) -> str:
        return self.step if self.index is None else f"{self.step} {self.index}{self._times}"

    @property
    def _times(self) -> str:
        return "" if self.count == 1 else f"x{self.count}"


def shard_tasks(job_id: str, indices: Sequence[int], shards: int) -> list[Task]:
    """Tasks for the shards of these ascending numbers, of a job that has so many in all.

    A large job's shards go several to a task, since to start one costs as much CPU as a shard of
    the fastest annotator; there are always enough tasks for many workers.
    """
    most = max(1, min(RUN_SHARDS, shards // RUNS))
    tasks: list[Task] = []
    for index in indices:
        last = tasks[-1] if tasks else None
        if last is not None and last.shards.stop == index and last.count < most:
            tasks[-1] = replace(last, count=last.count + 1)
        else:
            tasks.append(Task(job_id, "shard", index))
    return tasks


@dataclass(frozen=True, slots=True)
class Census:
    """The tasks in the queue's hands at one moment: waiting, due later, or running."""

    waiting: frozenset[Task]
    running: frozenset[Task]

    def of(self, job_id: str) -> frozenset[Task]:
        """The tasks of one job."""
        return frozenset(task for task in self.waiting | self.running if task.job_id == job_id)


class TaskQueue:
    """What is to be done, in the order in which it is to be done.

    Plans and merges go before the shards that wait, so that a small job is not stuck behind a
    large one's middle and a finished one gets its results.
    """

    def __init__(self, redis: redis.Redis) -> None:
        self._redis = redis
        self.rq = rq.Queue(NAME, connection=redis, serializer=JSONSerializer)
        self._scheduled = self.rq.scheduled_job_registry
        self._started = self.rq.started_job_registry
        self._failed = self.rq.failed_job_registry

    def enqueue(self, tasks: Iterable[Task]) -> None:
        """Add the tasks; one that is already queued runs twice, which does no harm."""
        waiting = [_enqueued(task, at_front=task.step != "shard") for task in tasks]
        for at in range(0, len(waiting), _BATCH):
            self.rq.enqueue_many(waiting[at : at + _BATCH])

    def give_back(self, tasks: Iterable[Task]) -> None:
        """Put tasks that were taken, but not begun, where they were: before all others."""
        self.rq.enqueue_many([_enqueued(task, at_front=True) for task in reversed(list(tasks))])

    def census(self) -> Census:
        """Where every task is, in one atomic look."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.lrange(self.rq.key, 0, -1)
            pipe.zrange(self._scheduled.key, 0, -1)
            pipe.zrange(self._started.key, 0, -1)
            pipe.lrange(self.rq.intermediate_queue_key, 0, -1)
            queued, scheduled, started, taken = (_texts(ids) for ids in pipe.execute())
        running = {self._started.parse_job_id(entry) for entry in started}
        taken = [task_id for task_id in taken if task_id not in running]
        return Census(
            waiting=_tasks([*queued, *scheduled, *self._still_fresh(taken)]),
            running=_tasks(running),
        )

    def lengths(self) -> tuple[int, int, int]:
        """How many tasks wait, are due later, and are running."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.llen(self.rq.key)
            pipe.zcard(self._scheduled.key)
            pipe.zcard(self._started.key)
            waiting, delayed, running = pipe.execute()
        return waiting, delayed, running

    def waited_seconds(self) -> float:
        """How long the first in line has waited; 0 for an empty line."""
        for task_id in self.rq.get_job_ids(length=1):
            first = self.rq.fetch_job(task_id)
            if first is not None and first.enqueued_at is not None:
                return max(0.0, (datetime.now(UTC) - first.enqueued_at).total_seconds())
        return 0.0

    def remove(self, tasks: Iterable[Task]) -> None:
        """Take waiting tasks out of the queue."""
        with self._redis.pipeline(transaction=False) as pipe:
            for task in tasks:
                self.rq.remove(task.id, pipeline=pipe)
                self._scheduled.remove(task.id, pipeline=pipe)
                pipe.delete(QueuedTask.key_for(task.id))
            pipe.execute()

    def requeue_abandoned(self) -> None:
        """Give the tasks of workers that have fallen silent to others."""
        self._started.cleanup()

    def enqueue_due(self) -> None:
        """Move the retries whose time has come from the schedule to the queue."""
        for task_id in self._scheduled.get_jobs_to_schedule():
            queued = self.rq.fetch_job(task_id)
            with self._redis.pipeline(transaction=True) as pipe:
                if queued is not None:
                    self.rq.enqueue_job(queued, pipeline=pipe)
                    activity.add(pipe, "retries")
                self._scheduled.remove(task_id, pipeline=pipe)
                pipe.execute()

    def exhausted(self) -> list[tuple[Task, str]]:
        """The tasks that were given up, each with the last reason; they are forgotten by this."""
        failures = []
        for task_id in self._failed.get_job_ids(cleanup=False):
            task = Task.parse(task_id)
            if task is None:
                continue
            queued = self.rq.fetch_job(task_id)
            failures.append((task, "no reason was kept" if queued is None else _reason(queued)))
            self._failed.remove(task_id, delete_job=True)
        return failures

    def _still_fresh(self, task_ids: list[str]) -> list[str]:
        """Those taken off the queue just now; a worker that died right then keeps no others."""
        limbo = IntermediateQueue(self.rq.key, self._redis)
        fresh = []
        for task_id in task_ids:
            limbo.set_first_seen(task_id)
            seen = limbo.get_first_seen(task_id)
            if seen is not None and time.time() - seen.timestamp() > LIMBO_SECONDS:
                limbo.remove(task_id)
                self._redis.delete(limbo.get_first_seen_key(task_id))
            else:
                fresh.append(task_id)
        return fresh


def _enqueued(task: Task, *, at_front: bool) -> Any:
    arguments = (task.job_id,) if task.index is None else (task.job_id, task.index, task.count)
    return rq.Queue.prepare_data(
        f"cwpo_worker.tasks.{task.step}",
        args=arguments,
        job_id=task.id,
        at_front=at_front,
        timeout=TIMEOUT_SECONDS,
        result_ttl=0,
        retry=Retry(max=len(RETRY_SECONDS), interval=list(RETRY_SECONDS)),
    )


def _reason(queued: QueuedTask) -> str:
    """The last line of the traceback, without the name of an error that speaks for itself."""
    result = queued.latest_result()
    lines = ((result and result.exc_string) or "").strip().splitlines()
    last = lines[-1].strip() if lines else "no reason was recorded"
    name, _, message = last.partition(": ")
    return message if message and name.endswith("Error") and name.startswith("cwpo") else last


def _texts(ids: Iterable[bytes]) -> list[str]:
    return [task_id.decode() for task_id in ids]


def _tasks(ids: Iterable[str]) -> frozenset[Task]:
    return frozenset(task for task in map(Task.parse, ids) if task is not None)
