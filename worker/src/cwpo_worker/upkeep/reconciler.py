"""Repairs the state of jobs after a crash, a kill, or the loss of Redis."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import redis
from redis.exceptions import LockError

from cwpo.errors import CwpoError, first_line
from cwpo.types import JobState
from cwpo_worker.errors import DamagedRecordError, UnknownJobError
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.record import PLANNING_STATES, JobRecord
from cwpo_worker.queue.task_queue import Census, Task
from cwpo_worker.queue.totals import note_reconciled
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import FileCatalog
from cwpo_worker.upkeep.collection import collect_unrecorded
from cwpo_worker.upkeep.retention import delete_expired

INTERVAL_SECONDS = 2.0
LOCK = "cwpo:reconciler"
# Of a reconciler that dies: less than until its worker's task counts as abandoned.
LOCK_SECONDS = 15.0

log = logging.getLogger(__name__)


class Reconciler:
    """Compares the tasks that jobs need with those that are queued or done, and queues the rest.

    Args:
        redis, store: those of the lifecycle and the ledger.
        kept: how long ended jobs and unused files are kept; None until they are deleted.
    """

    def __init__(
        self,
        redis: redis.Redis,
        store: BlobStore,
        lifecycle: Lifecycle,
        ledger: Ledger,
        kept: timedelta | None = None,
    ) -> None:
        self._redis = redis
        self._store = store
        self._lifecycle = lifecycle
        self._registry = lifecycle.registry
        self._finished = lifecycle.finished
        self._turns = lifecycle.turns
        self._queue = lifecycle.queue
        self._ledger = ledger
        self._kept = kept

    def reconcile(self) -> None:
        """Run one round; returns at once if another process is running one.

        Restores lost records, requeues abandoned tasks and due retries, fails the jobs of tasks
        that have no attempts left, ends cancelled jobs, queues every task that an active job needs
        and that is neither queued nor running, and removes deleted jobs and what belongs to none.

        Raises: redis.RedisError, StoreError.
        """
        lock = self._redis.lock(LOCK, timeout=LOCK_SECONDS)
        if not lock.acquire(blocking=False):
            return
        try:
            self._registry.restore_lost()
            self._queue.requeue_abandoned()
            self._queue.enqueue_due()
            for task, reason in self._queue.exhausted():
                with suppress(UnknownJobError, DamagedRecordError):
                    self._lifecycle.give_up(task, f"{task} was given up: {reason}")
            states = self._registry.active_states()
            # Read before the census: what is queued in between is not lost.
            queued = self._turns.queued(states)
            census = self._queue.census()
            for job_id, state in states.items():
                lock.reacquire()
                with suppress(UnknownJobError, DamagedRecordError):
                    self._advance(job_id, state, queued[job_id], census)
            self._turns.queue_next()
            if self._kept is not None:
                files = FileCatalog(self._store)
                delete_expired(self._redis, self._registry, files, self._ledger, self._kept)
            self._purge(census)
            collect_unrecorded(self._redis, self._store)
            self._store.sweep()
            note_reconciled(self._redis)
        finally:
            with suppress(LockError):
                lock.release()

    def _advance(self, job_id: str, before: JobState, queued: set[int], census: Census) -> None:
        """Queue what the job needs, unless its state has changed since before the census.

        Then the census may miss its newest tasks, such as the merge after the last shard.

        Args:
            queued: its shards that were queued and not finished before the census.
        """
        record = self._registry.get(job_id)
        if record.state != before:
            return
        held = census.of(job_id)
        is_planning = record.state in PLANNING_STATES and not record.is_planned
        if is_planning and not any(task.step == "plan" for task in held):
            self._enqueue_lost(Task(job_id, "plan", record.files_planned or None))
        if record.state in ("queued", "running"):
            self._advance_shards(record, queued, held)
        elif record.state == "finalizing" and Task(job_id, "merge") not in held:
            self._enqueue_lost(Task(job_id, "merge"))
        elif record.state == "cancelling":
            self._lifecycle.settle(job_id, census)

    def _advance_shards(self, record: JobRecord, queued: set[int], held: frozenset[Task]) -> None:
        planned, known = record.shards or 0, self._turns.shards_of(record.id)
        if self._lifecycle.has_finished(record):
            self._lifecycle.finalize(record.id)
        elif known is None:
            self._registry.give_turn(record.id)
        elif known < planned:
            self._turns.extend(record.id, planned)
        elif lost := queued.difference(*(task.shards for task in held)):
            log.debug("lost shards of %s are queued again: %d", record.id, len(lost))
            self._turns.put_back(record.id, lost)

    def _enqueue_lost(self, task: Task) -> None:
        log.debug("%s of %s was lost, and is queued again", task, task.job_id)
        self._queue.enqueue(task)

    def _purge(self, census: Census) -> None:
        for job_id in self._registry.deleted():
            self._queue.remove(task for task in census.waiting if task.job_id == job_id)
            # A shard of a failed job may still be at work, and would leave its part behind.
            if not any(task.job_id == job_id for task in census.running):
                self._registry.purge(job_id)


class ReconcilerThread(threading.Thread):
    """Reconciles every two seconds in the background of a worker.

    Args:
        reconciler: has a connection of its own.
        on_death: called when the thread ends because of an unexpected error, which is logged.
    """

    def __init__(self, reconciler: Reconciler, on_death: Callable[[], None]) -> None:
        super().__init__(name="reconciler", daemon=True)
        self._reconciler = reconciler
        self._on_death = on_death
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until `stop`; of rounds that fail in a row, the first is logged."""
        try:
            self._run()
        except Exception as error:
            # Without the error's text, which could quote a row.
            trace = "".join(traceback.format_tb(error.__traceback__))
            log.error("the search for lost tasks failed: %s\n%s", type(error).__name__, trace)
            self._on_death()

    def _run(self) -> None:
        is_failing = False
        while not self._stopped.wait(INTERVAL_SECONDS):
            try:
                self._reconciler.reconcile()
                is_failing = False
            except (redis.RedisError, CwpoError) as error:
                if not is_failing:
                    log.warning(
                        "cannot look for lost tasks: %s; it is tried again every %g s",
                        first_line(error),
                        INTERVAL_SECONDS,
                    )
                is_failing = True

    def stop(self) -> None:
        """End after the current round."""
        self._stopped.set()
