"""A worker process: RQ's worker, the objects that its tasks use, and the reconciler."""

from __future__ import annotations

import gc
import logging
import os
import signal
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import redis

from cwpo import Client
from cwpo.errors import ConfigError, CwpoError
from cwpo.process import collect_garbage_rarely
from cwpo_worker import tasks
from cwpo_worker.errors import QueueUnavailableError
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.queue.connection import connect, queue_errors
from cwpo_worker.rq_worker import TaskWorker
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import FileCatalog
from cwpo_worker.upkeep.reconciler import Reconciler, ReconcilerThread


class WorkerProcess:
    """A worker; everything is imported and built before RQ forks a child for each task.

    The client opens no connection before its first request, which a child makes.
    Raises: QueueUnavailableError or StoreError if Redis or the store cannot be used; ConfigError
        for a heartbeat file that cannot be written.
    """

    def __init__(
        self,
        client: Client,
        redis_url: str,
        store_url: str,
        *,
        former: Client | None = None,
        heartbeat_seconds: int,
        model_wait: timedelta,
        kept: timedelta | None = None,
        discard_shards: bool = False,
        heartbeat_file: Path | None = None,
    ) -> None:
        if heartbeat_file is not None:
            _check_writable(heartbeat_file)
        store = BlobStore(store_url)
        store.check()
        connection = connect(redis_url)
        with queue_errors():
            connection.ping()
        self._reconciler = _reconciler(connect(redis_url), store, kept)
        lifecycle = Lifecycle(connection, store)
        self._is_broken = False
        self._worker = TaskWorker(
            lifecycle.queue, heartbeat_seconds, tasks.wind_down, heartbeat_file=heartbeat_file
        )
        tasks.equip(tasks.Tools(lifecycle, store, client, model_wait, discard_shards, former))
        # The first array looks for pandas, and importing it takes longer than a shard does.
        pa.array([""])
        collect_garbage_rarely()
        # What is here stays: a child that never looks at it shares its memory.
        gc.freeze()

    def _stop(self) -> None:
        """End the worker after its current task."""
        self._is_broken = True
        os.kill(os.getpid(), signal.SIGTERM)

    def run(self, *, burst: bool) -> None:
        """Work until SIGTERM or SIGINT, or until the queue is empty.

        Raises: QueueUnavailableError if Redis stays unavailable; CwpoError if the search for lost
            tasks has failed, so that the worker is started again.
        """
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("cwpo_worker").setLevel(logging.INFO)
        background = ReconcilerThread(self._reconciler, on_death=self._stop)
        with queue_errors():
            if burst:
                self._reconciler.reconcile()
            else:
                background.start()
            self._worker.work(burst=burst, logging_level="ERROR")
        background.stop()
        if self._is_broken:
            raise CwpoError("the worker ends: its search for lost tasks failed")
        if not burst and not self._worker.was_stopped:
            raise QueueUnavailableError("the worker lost its job queue; the lines above say how")


def _check_writable(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise ConfigError(
            f"--heartbeat-file {path} cannot be written: {error.strerror}: name a file in a folder "
            "that is there and can be written"
        ) from error


def _reconciler(redis: redis.Redis, store: BlobStore, kept: timedelta | None) -> Reconciler:
    lifecycle = Lifecycle(redis, store)
    return Reconciler(
        redis, store, lifecycle, Ledger(redis, store, lifecycle, FileCatalog(store)), kept
    )
