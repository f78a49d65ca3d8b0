"""The turns of jobs: their shards are queued a few at a time, so that no job waits for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import cast

import redis
from pydantic import BaseModel
from redis.client import Pipeline

from cwpo.types import Priority
from cwpo_worker.jobs.finished_shards import shard_keys
from cwpo_worker.jobs.record import JobRecord
from cwpo_worker.jobs.shard_ranges import Ranges, joined
from cwpo_worker.queue.task_queue import Census, Task, TaskQueue

# Of each job whose shards are being annotated, by id, its turn.
TURNS = "cwpo:turns"
# Most shards of a task, and the number of tasks below which a job's shards are not put together.
RUN_SHARDS = 8
RUNS = 16
# Waiting tasks of an owner: enough for a worker to find one, and for as many workers as there are
# running tasks to find one each before the next tasks are queued.
PLACES = 2
RUNNING_PER_PLACE = 4


class Turn(BaseModel):
    """What a job has left to queue, and what decides when.

    left: the numbers of the shards that are not queued and not finished.
    """

    owner: str | None
    priority: Priority
    created_at: datetime
    shards: int
    left: Ranges

    @classmethod
    def of(cls, record: JobRecord) -> Turn:
        """That of a job of which nothing is queued."""
        shards = record.shards or 0
        return cls(
            owner=record.owner,
            priority=record.priority,
            created_at=record.created_at,
            shards=shards,
            left=joined([(0, shards)]),
        )

    @property
    def run_shards(self) -> int:
        """Most shards of a task.

        In a large job a task has several shards, since starting a task takes as much CPU time as a
        shard of the fastest annotator. There are always enough tasks for many workers.
        """
        return max(1, min(RUN_SHARDS, self.shards // RUNS))

    @property
    def is_new(self) -> bool:
        """Whether nothing of the job was queued yet."""
        return self.left == [(0, self.shards)]

    @property
    def tasks_left(self) -> int:
        """How many tasks the shards that are left will be."""
        return sum(-((start - stop) // self.run_shards) for start, stop in self.left)

    def take(self, job_id: str) -> Task:
        """The next task, whose shards are no longer left."""
        start, stop = self.left.pop(0)
        middle = min(stop, start + self.run_shards)
        if middle < stop:
            self.left.insert(0, (middle, stop))
        return Task(job_id, "shard", start, middle - start)

    def extend(self, shards: int) -> None:
        """Let the job have so many shards, of which the new ones are left."""
        self.left = joined([*self.left, (self.shards, shards)])
        self.shards = shards

    def put_back(self, shards: Iterable[int]) -> None:
        """Let the shards be left again."""
        self.left = joined([*self.left, *((index, index + 1) for index in shards)])


class Turns:
    """The turns of all jobs whose shards are being annotated, in Redis.

    A job has a turn from when its first shards are planned (the registry adds it with the job's
    record) until its last one is finished. What is queued is known by the job, and by the queue:
    what the first has and the second has not was lost.
    """

    def __init__(self, redis: redis.Redis, queue: TaskQueue) -> None:
        self._redis = redis
        self._queue = queue

    def queue_next(self) -> None:
        """Queue the shards whose turn it is, as long as there is a place for them."""

        def attempt(pipe: Pipeline) -> None:
            turns = self._read(pipe)
            due = list(due_tasks(turns, self._queue.census()))
            pipe.multi()
            for task, at_front in due:
                pipe.sadd(shard_keys(task.job_id).queued, *task.shards)
                self._queue.enqueue(task, at_front=at_front, pipe=pipe)
            self._write(pipe, {task.job_id: turns[task.job_id] for task, _ in due})

        self._transaction(attempt)

    def extend(self, job_id: str, shards: int) -> None:
        """Let a job have so many shards by now; does nothing if it has no turn, or as many."""

        def attempt(pipe: Pipeline) -> None:
            turn = self._read(pipe).get(job_id)
            pipe.multi()
            if turn is not None and turn.shards < shards:
                turn.extend(shards)
                self._write(pipe, {job_id: turn})

        self._transaction(attempt)

    def put_back(self, job_id: str, shards: Iterable[int]) -> None:
        """Queue shards once more, that were queued and that nobody is working on."""
        queued = shard_keys(job_id).queued

        def attempt(pipe: Pipeline) -> None:
            turns = self._read(pipe)
            # A shard that was finished meanwhile is not among these any more.
            known = {int(index) for index in cast("set[bytes]", self._redis.smembers(queued))}
            pipe.multi()
            if job_id in turns and (again := known.intersection(shards)):
                turns[job_id].put_back(again)
                self._write(pipe, {job_id: turns[job_id]})
                pipe.srem(queued, *again)

        self._transaction(attempt)

    def queued(self, job_ids: Iterable[str]) -> dict[str, set[int]]:
        """The shards of these jobs that were queued and are not finished."""
        job_ids = list(job_ids)
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.smembers(shard_keys(job_id).queued)
            found = pipe.execute()
        return {
            job_id: {int(index) for index in indices}
            for job_id, indices in zip(job_ids, found, strict=True)
        }

    def shards_of(self, job_id: str) -> int | None:
        """How many shards the job has by its turn; None if it has none."""
        turn = cast("bytes | None", self._redis.hget(TURNS, job_id))
        return None if turn is None else Turn.model_validate_json(turn).shards

    def tasks_left(self) -> int:
        """How many tasks of all jobs are not queued yet."""
        return sum(turn.tasks_left for turn in self._read(self._redis).values())

    def _transaction(self, attempt: Callable[[Pipeline], None]) -> None:
        self._redis.transaction(attempt, TURNS)

    def _read(self, redis: redis.Redis | Pipeline) -> dict[str, Turn]:
        raw = cast("dict[bytes, bytes]", redis.hgetall(TURNS))
        return {job_id.decode(): Turn.model_validate_json(turn) for job_id, turn in raw.items()}

    def _write(self, pipe: Pipeline, turns: Mapping[str, Turn]) -> None:
        for job_id, turn in turns.items():
            pipe.hset(TURNS, job_id, turn.model_dump_json())


def due_tasks(turns: Mapping[str, Turn], census: Census) -> Iterator[tuple[Task, bool]]:
    """The tasks that are queued next, each with whether it goes before all others; takes them.

    Each owner has a few places in the queue, however many jobs it has, so that a turn comes soon. A
    free place is for one of its interactive jobs, or else of the others: that with the fewest tasks
    in the queue and at work; of several, the oldest. One place more is kept for a job of which
    nothing was queued yet; if its owner has fewer tasks than the others that wait, it goes before
    them.
    """
    held = _Held(turns, census)
    while candidates := [job_id for job_id in turns if held.has_place(job_id)]:
        job_id = min(candidates, key=held.rank)
        at_front = turns[job_id].is_new and held.is_least(turns[job_id].owner)
        task = turns[job_id].take(job_id)
        held.add(task)
        yield task, at_front


class _Held:
    """The numbers of tasks that jobs and owners have: of those that wait, and with those that run.

    A task that is to be retried later is in nobody's way, and counts as neither.
    """

    def __init__(self, turns: Mapping[str, Turn], census: Census) -> None:
        self._turns = turns
        mine = {task for task in census.waiting | census.running if task.job_id in turns}
        shards = {task for task in mine if task.step == "shard"}
        self._delayed = Counter(task.job_id for task in shards & census.delayed)
        self._running = Counter(task.job_id for task in shards & census.running)
        self._of_job: Counter[str] = Counter()
        self._of_owner: Counter[str | None] = Counter()
        self._waiting: Counter[str | None] = Counter()
        for task in shards & census.running:
            self._count(task)
        for task in shards & census.waiting - census.delayed - census.running:
            self.add(task)
        owners = len({turn.owner for turn in turns.values()})
        self._places = max(PLACES, self._running.total() // (RUNNING_PER_PLACE * max(1, owners)))

    def has_place(self, job_id: str) -> bool:
        """Whether one more task of the job may wait.

        A job with more retries ahead than tasks at work waits for its service.
        """
        turn = self._turns[job_id]
        is_stuck = self._delayed[job_id] >= max(PLACES, self._running[job_id])
        places = self._places + turn.is_new
        return bool(turn.left) and not is_stuck and self._waiting[turn.owner] < places

    def rank(self, job_id: str) -> tuple[bool, int, datetime, str]:
        """The lower it is, the earlier is the job's turn among those of its owner."""
        turn = self._turns[job_id]
        return turn.priority == "batch", self._of_job[job_id], turn.created_at, job_id

    def is_least(self, owner: str | None) -> bool:
        """Whether the owner has fewer tasks than each other owner of whom some wait."""
        others = {other for other, waiting in self._waiting.items() if waiting} - {owner}
        return all(self._of_owner[owner] < self._of_owner[other] for other in others)

    def add(self, task: Task) -> None:
        """Count a task that waits."""
        self._waiting[self._turns[task.job_id].owner] += 1
        self._count(task)

    def _count(self, task: Task) -> None:
        self._of_job[task.job_id] += 1
        self._of_owner[self._turns[task.job_id].owner] += 1
