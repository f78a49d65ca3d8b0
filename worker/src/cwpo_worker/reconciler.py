"""Puts right what a crash, a kill or a lost Redis left behind."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from datetime import timedelta

import redis
from redis.exceptions import LockError

from cwpo.errors import CwpoError
from cwpo.types import JobState
from cwpo_worker.errors import UnknownJobError
from cwpo_worker.ledger import Ledger
from cwpo_worker.queue import Census, Task, shard_tasks
from cwpo_worker.retention import expire

INTERVAL_SECONDS = 2.0
LOCK = "cwpo:reconciler"
# Of a reconciler that dies: less than until its worker's task counts as abandoned.
LOCK_SECONDS = 15.0
# Set to the server's run id once the store's jobs are known to it: a restart or a flush unsets it.
RESTORED = "cwpo:restored"

log = logging.getLogger(__name__)


def reconcile(ledger: Ledger, kept: timedelta | None = None) -> None:
    """One round; returns at once where another process is at it.

    Restores lost records, gives abandoned tasks and due retries to the workers, fails the jobs of
    tasks that were given up, ends cancelled jobs, queues every task that an active job needs and
    nobody has, and removes what was deleted.

    Args:
        kept: how long ended jobs and unused files are; None until they are deleted.
    Raises: redis.RedisError, StoreError.
    """
    lock = ledger.redis.lock(LOCK, timeout=LOCK_SECONDS)
    if not lock.acquire(blocking=False):
        return
    try:
        _restore(ledger)
        ledger.queue.requeue_abandoned()
        ledger.queue.enqueue_due()
        for task, reason in ledger.queue.exhausted():
            with suppress(UnknownJobError):
                ledger.give_up(task, f"{task} was given up: {reason}")
        states = ledger.records.active_states()
        census = ledger.queue.census()
        for job_id, state in states.items():
            lock.reacquire()
            with suppress(UnknownJobError):
                _advance(ledger, job_id, state, census)
        if kept is not None:
            expire(ledger, kept)
        _purge(ledger, census)
        ledger.store.sweep()
    finally:
        with suppress(LockError):
            lock.release()


def _restore(ledger: Ledger) -> None:
    info = ledger.redis.info("server")
    run_id = str(info["run_id"]).encode()
    if ledger.redis.get(RESTORED) == run_id:
        return
    for record in ledger.records.mirrored():
        ledger.records.restore(record)
    ledger.redis.set(RESTORED, run_id)


def _advance(ledger: Ledger, job_id: str, before: JobState, census: Census) -> None:
    """Do what the job needs, unless its state is another than before the census.

    Its tasks are others then, such as the merge that a job queues with its last shard.
    """
    record = ledger.records.get(job_id)
    if record.state != before:
        return
    held = census.of(job_id)
    if Task(job_id, "plan") in held:
        return  # It may be about to queue the very shards that seem to be missing.
    if record.state == "validating":
        _enqueue_lost(ledger, [Task(job_id, "plan")])
    elif record.state in ("queued", "running"):
        parts = ledger.records.parts(job_id)
        missing = [index for index in range(record.shards or 0) if index not in parts]
        if not missing:
            ledger.finalize(job_id)
        in_hands = {index for task in held for index in task.shards}
        lost = [index for index in missing if index not in in_hands]
        _enqueue_lost(ledger, shard_tasks(job_id, lost, record.shards or 0))
    elif record.state == "finalizing" and Task(job_id, "merge") not in held:
        _enqueue_lost(ledger, [Task(job_id, "merge")])
    elif record.state == "cancelling":
        ledger.settle(job_id, census)


def _enqueue_lost(ledger: Ledger, tasks: list[Task]) -> None:
    if tasks:
        log.info("job %s: %d tasks that nobody has are queued", tasks[0].job_id, len(tasks))
        ledger.queue.enqueue(tasks)


def _purge(ledger: Ledger, census: Census) -> None:
    for job_id in ledger.records.deleted():
        ledger.queue.remove(task for task in census.waiting if task.job_id == job_id)
        # A shard of a failed job may still be at work, and would leave its part behind.
        if not any(task.job_id == job_id for task in census.running):
            ledger.records.purge(job_id)


class Reconciler(threading.Thread):
    """Reconciles again and again, in the background of a worker, with a connection of its own."""

    def __init__(self, ledger: Ledger, kept: timedelta | None = None) -> None:
        super().__init__(name="reconciler", daemon=True)
        self._ledger = ledger
        self._kept = kept
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until `stop`; a round that fails is logged and the next one tries again."""
        while not self._stopped.wait(INTERVAL_SECONDS):
            try:
                reconcile(self._ledger, self._kept)
            except (redis.RedisError, CwpoError) as error:
                log.warning("could not reconcile: %s", error)

    def stop(self) -> None:
        """End after the round that is under way."""
        self._stopped.set()
