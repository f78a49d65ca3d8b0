"""A worker process: RQ's worker, the tools of its tasks, and the reconciler beside it."""

from __future__ import annotations

import gc
import logging
from datetime import timedelta

import pyarrow as pa

from cwpo import Client
from cwpo_worker import tasks
from cwpo_worker.connection import connect, queue_errors
from cwpo_worker.errors import QueueUnavailableError
from cwpo_worker.ledger import Ledger
from cwpo_worker.reconciler import Reconciler, reconcile
from cwpo_worker.store import BlobStore
from cwpo_worker.task_worker import TaskWorker

# Rows are many objects and no cycles: looking for some every 700 doubles the time of a task.
GC_THRESHOLDS = (50_000, 20, 100)


class WorkerProcess:
    """Everything is imported and built here, before RQ forks a child for each task.

    The client opens no connection before its first request, which a child makes.
    Raises: QueueUnavailableError, StoreError when Redis or the store cannot be used.
    """

    def __init__(
        self,
        client: Client,
        redis_url: str,
        store_url: str,
        *,
        heartbeat_seconds: int,
        kept: timedelta | None = None,
    ) -> None:
        store = BlobStore(store_url)
        store.check()
        self._ledger = Ledger(connect(redis_url), store)
        self._ledger.check()
        self._reconciler = Reconciler(Ledger(connect(redis_url), store), kept)
        self._kept = kept
        self._worker = TaskWorker(self._ledger.queue, heartbeat_seconds, tasks.wind_down)
        tasks.equip(tasks.Tools(self._ledger, client))
        # The first array looks for pandas, and importing it takes longer than a shard does.
        pa.array([""])
        gc.set_threshold(*GC_THRESHOLDS)
        # What is here stays: a child that never looks at it shares its memory.
        gc.freeze()

    def run(self, *, burst: bool) -> None:
        """Work until SIGTERM or SIGINT, or until the queue is empty.

        Raises: QueueUnavailableError when Redis is lost for good.
        """
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        with queue_errors():
            if burst:
                reconcile(self._ledger, self._kept)
            else:
                self._reconciler.start()
            self._worker.work(burst=burst, logging_level="WARNING")
        self._reconciler.stop()
        if not burst and not self._worker.was_stopped:
            raise QueueUnavailableError("the worker lost its job queue; the log says how")
