"""The task queue: RQ with JSON instead of pickle, and with an allow-list of functions."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast, get_args

import redis
import rq
from redis.client import Pipeline
from rq import worker_registration
from rq.executions import Execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job as QueuedTask
from rq.job import JobStatus, Retry
from rq.serializers import JSONSerializer

from cwpo_worker.queue.totals import add_to_count

Step = Literal["plan", "shard", "merge"]

NAME = "cwpo"
# A task that raises or dies is tried again after these seconds; then its job fails.
RETRY_SECONDS = (1, 1, 2, 2, 5, 5, 15, 30, 60, 60, 60, 60)
# A task whose service is away waits so long before each further try.
SERVICE_RETRY_SECONDS = (2, 5, 10, 20, 30)
TIMEOUT_SECONDS = 6 * 3600
# A worker registers a task as started milliseconds after it took it; one that takes longer died.
INTERMEDIATE_SECONDS = 10.0
# A task that ends so many workers within a day is at fault itself.
MAX_LOSSES = 100
LOSSES_SECONDS = 24 * 3600
ALLOWED = frozenset(f"cwpo_worker.tasks.{step}" for step in get_args(Step))
_TASK_ID = re.compile(
    r"(?P<job>job-[0-9a-f]{24})_(?P<step>plan|shard|merge)(_(?P<index>\d+)(x(?P<count>\d+))?)?"
)


@dataclass(frozen=True, slots=True)
class Task:
    """One step of a job.

    A shard task does `count` shards, from number `index` on. A plan task reads the input file of
    number `index`: the first one has no index, and each queues the next.
    """

    job_id: str
    step: Step
    index: int | None = None
    count: int = 1

    @property
    def id(self) -> str:
        """The name of the task in the queue; equal tasks have equal names."""
        suffix = "" if self.index is None else f"_{self.index:05d}"
        return f"{self.job_id}_{self.step}{suffix}{self._times}"

    @property
    def shards(self) -> range:
        """The numbers of the task's shards; empty for a plan or a merge."""
        if self.step != "shard" or self.index is None:
            return range(0)
        return range(self.index, self.index + self.count)

    @property
    def is_urgent(self) -> bool:
        """Whether it goes before waiting shards: so that a small job does not wait for a large one.

        The plans of further files take their turn: a job of many files is no small one.
        """
        return self.step == "merge" or (self.step == "plan" and not self.index)

    @classmethod
    def parse(cls, task_id: str) -> Task | None:
        """The task with this id; None if it is not the id of a task."""
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


@dataclass(frozen=True, slots=True)
class Census:
    """The tasks of all jobs at one moment; `waiting` includes `delayed`, to be retried later."""

    waiting: frozenset[Task]
    delayed: frozenset[Task]
    running: frozenset[Task]

    def of(self, job_id: str) -> frozenset[Task]:
        """The tasks of one job."""
        return frozenset(task for task in self.waiting | self.running if task.job_id == job_id)


class TaskQueue:
    """The tasks that workers take, in this order. They are few: of a large job, some of its shards.

    The first plan of a job and its merge go before waiting shards, so that a small job does not
    wait for the shards of a large one, and a job whose shards are finished gets its results. The
    plans of further files wait behind what is there: shards, and the plans of others.
    """

    def __init__(self, redis: redis.Redis) -> None:
        self._redis = redis
        self.rq = rq.Queue(NAME, connection=redis, serializer=JSONSerializer)
        self._scheduled = self.rq.scheduled_job_registry
        self._started = self.rq.started_job_registry
        self._failed = self.rq.failed_job_registry

    def enqueue(
        self, task: Task, *, at_front: bool | None = None, pipe: Pipeline | None = None
    ) -> None:
        """Add a task, at once or with the pipeline; an urgent one at the front, if not told.

        A task that is already queued runs twice, with the same result.
        """
        is_first = task.is_urgent if at_front is None else at_front
        self.rq.enqueue_many([_enqueued(task, at_front=is_first)], pipeline=pipe)

    def census(self) -> Census:
        """The tasks that wait and those that run, read in one transaction."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.lrange(self.rq.key, 0, -1)
            pipe.zrange(self._scheduled.key, 0, -1)
            pipe.zrange(self._started.key, 0, -1)
            pipe.lrange(self.rq.intermediate_queue_key, 0, -1)
            queued, scheduled, started, taken = (_texts(ids) for ids in pipe.execute())
        running = {self._started.parse_job_id(entry) for entry in started}
        taken = [task_id for task_id in taken if task_id not in running]
        return Census(
            waiting=_tasks([*queued, *scheduled, *self._just_taken(taken)]),
            delayed=_tasks(scheduled),
            running=_tasks(running),
        )

    def lengths(self) -> tuple[int, int, int]:
        """The numbers of tasks that wait, that are to be retried later, and that run."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.llen(self.rq.key)
            pipe.zcard(self._scheduled.key)
            pipe.zcard(self._started.key)
            waiting, delayed, running = pipe.execute()
        return waiting, delayed, running

    def first(self) -> Task | None:
        """The task that a worker takes next; None if none waits."""
        ids = self.rq.get_job_ids(length=1)
        return Task.parse(ids[0]) if ids else None

    def waited_seconds(self) -> float:
        """Seconds that the first waiting task has waited; 0 if none waits."""
        for task_id in self.rq.get_job_ids(length=1):
            first = self.rq.fetch_job(task_id)
            if first is not None and first.enqueued_at is not None:
                return max(0.0, (datetime.now(UTC) - first.enqueued_at).total_seconds())
        return 0.0

    def workers(self) -> int:
        """The number of workers; one that was killed counts for up to two minutes more.

        So long lives the key that RQ keeps of a worker, which an idle one renews rarely.
        """
        keys = worker_registration.get_keys(self.rq)
        return self._redis.exists(*keys) if keys else 0

    def remove(self, tasks: Iterable[Task]) -> None:
        """Take waiting tasks out of the queue."""
        with self._redis.pipeline(transaction=False) as pipe:
            for task in tasks:
                self.rq.remove(task.id, pipeline=pipe)
                self._scheduled.remove(task.id, pipeline=pipe)
                pipe.delete(QueuedTask.key_for(task.id))
            pipe.execute()

    def requeue_abandoned(self) -> None:
        """Requeue the tasks of workers whose heartbeat has stopped, before all others.

        A heartbeat expires by the clock of Redis, so the clocks of other machines do not matter.
        The loss of a worker is not a failure of its task, and does not use up its retries.
        """
        entries = _texts(cast("list[bytes]", self._redis.zrange(self._started.key, 0, -1)))
        # Both at one moment: a task that has just ended is in neither place.
        with self._redis.pipeline(transaction=True) as pipe:
            for entry in entries:
                pipe.zscore(self._started.key, entry)
                pipe.exists(Execution.from_composite_key(entry, self._redis).key)
            found = pipe.execute()
        for entry, is_started, is_alive in zip(entries, found[::2], found[1::2], strict=True):
            if is_started is not None and not is_alive:
                self._requeue_lost(entry)

    def _requeue_lost(self, entry: str) -> None:
        task_id = self._started.parse_job_id(entry)
        queued = self.rq.fetch_job(task_id)
        losses = self._redis.incr(_losses_key(task_id))
        with self._redis.pipeline(transaction=True) as pipe:
            if queued is not None and losses < MAX_LOSSES:
                self.rq.enqueue_job(queued, pipeline=pipe, at_front=True)
                add_to_count(pipe, "retries")
            elif queued is not None:
                queued.set_status(JobStatus.FAILED, pipeline=pipe)
                self._failed.add(queued, pipeline=pipe)
            if queued is not None:
                Execution.from_composite_key(entry, self._redis).delete(queued, pipe)
            pipe.expire(_losses_key(task_id), LOSSES_SECONDS)
            pipe.zrem(self._started.key, entry)
            pipe.execute()

    def enqueue_due(self) -> None:
        """Move the retries that are due from the schedule to the queue."""
        for task_id in self._scheduled.get_jobs_to_schedule():
            queued = self.rq.fetch_job(task_id)
            with self._redis.pipeline(transaction=True) as pipe:
                if queued is not None:
                    self.rq.enqueue_job(queued, pipeline=pipe)
                    add_to_count(pipe, "retries")
                self._scheduled.remove(task_id, pipeline=pipe)
                pipe.execute()

    def exhausted(self) -> list[tuple[Task, str]]:
        """Remove and return the tasks whose last attempt failed, each with the reason."""
        failures = []
        for task_id in self._failed.get_job_ids(cleanup=False):
            task = Task.parse(task_id)
            if task is None:
                continue
            queued = self.rq.fetch_job(task_id)
            losses = int(cast("bytes | None", self._redis.get(_losses_key(task_id))) or 0)
            if losses >= MAX_LOSSES:
                reason = f"{losses} workers were lost while they had it"
            else:
                reason = "no reason was kept" if queued is None else _reason(queued)
            failures.append((task, reason))
            self._failed.remove(task_id, delete_job=True)
            self._redis.delete(_losses_key(task_id))
        return failures

    def _just_taken(self, task_ids: list[str]) -> list[str]:
        """Tasks taken off the queue just now; older ones, whose workers died, are dropped."""
        intermediate = IntermediateQueue(self.rq.key, self._redis)
        alive = []
        for task_id in task_ids:
            intermediate.set_first_seen(task_id)
            seen = intermediate.get_first_seen(task_id)
            if seen is not None and time.time() - seen.timestamp() > INTERMEDIATE_SECONDS:
                intermediate.remove(task_id)
                self._redis.delete(intermediate.get_first_seen_key(task_id))
            else:
                alive.append(task_id)
        return alive


def _losses_key(task_id: str) -> str:
    return f"cwpo:losses:{task_id}"


def _enqueued(task: Task, *, at_front: bool) -> Any:
    arguments: tuple[str | int, ...] = (task.job_id,)
    if task.index is not None:
        arguments += (task.index,) if task.step == "plan" else (task.index, task.count)
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
    trace = None if result is None else result.exc_string
    lines = (trace or "").strip().splitlines()
    last = lines[-1].strip() if lines else "no reason was recorded"
    name, _, message = last.partition(": ")
    return message if message and name.endswith("Error") and name.startswith("cwpo") else last


def _texts(ids: Iterable[bytes]) -> list[str]:
    return [task_id.decode() for task_id in ids]


def _tasks(ids: Iterable[str]) -> frozenset[Task]:
    return frozenset(task for task in map(Task.parse, ids) if task is not None)
