"""RQ's worker, with an allow-list of what may run, and with an end that loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import rq
from rq.job import Job as QueuedTask
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from cwpo.process import die_with_parent
from cwpo_worker.queue import ALLOWED, TaskQueue

WIND_DOWN = signal.SIGUSR1


class TaskWorker(rq.Worker):
    """RQ's forking worker, which refuses whatever is not one of our tasks before it runs.

    A task dies with its worker. SIGTERM lets both end after the shard at hand.

    Args:
        heartbeat_seconds: without a sign of life for so long, its task is given to another.
        wind_down: tells the task, in its process, that the worker ends.
    """

    def __init__(
        self, queue: TaskQueue, heartbeat_seconds: int, wind_down: Callable[[], None]
    ) -> None:
        self.heartbeat_seconds = heartbeat_seconds
        self.was_stopped = False
        self._wind_down = wind_down
        self._die_with_worker = die_with_parent()
        # Until a task listens for it.
        signal.signal(WIND_DOWN, signal.SIG_IGN)
        super().__init__(
            [queue.rq],
            connection=queue.rq.connection,
            serializer=JSONSerializer,
            job_monitoring_interval=max(1, heartbeat_seconds // 3),
        )

    def get_heartbeat_ttl(self, job: QueuedTask) -> int:
        """Seconds until the task counts as abandoned."""
        return self.heartbeat_seconds

    def handle_warm_shutdown_request(self) -> None:
        """Remember that the end is wanted, and tell the task."""
        self.was_stopped = True
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, WIND_DOWN)

    def setup_work_horse_signals(self) -> None:
        """In the process of a task: listen for the worker's end."""
        super().setup_work_horse_signals()  # type: ignore[no-untyped-call]
        signal.signal(WIND_DOWN, lambda *_: self._wind_down())
        if self._die_with_worker is not None:
            self._die_with_worker()

    def execute_job(self, job: QueuedTask, queue: rq.Queue) -> None:
        """Fork and run the task, if it is one."""
        refusal = _refusal(job)
        if refusal is None:
            super().execute_job(job, queue)
            return
        self.log.error("refused %s: %s", job.id, refusal)
        queue.intermediate_queue.remove(job.id)
        job.set_status(JobStatus.FAILED)
        queue.failed_job_registry.add(job, exc_string=f"refused: {refusal}")


def _refusal(queued: QueuedTask) -> str | None:
    """Why it may not run, None if it may."""
    try:
        name, instance = queued.func_name, queued.instance
    except Exception as error:
        return f"its call is not JSON ({type(error).__name__})"
    if name not in ALLOWED or instance is not None:
        return f"{name} is not a task"
    described = queued.to_dict(include_result=False)
    hooks = [field for field in described if "callback_name" in field and described[field]]
    if hooks or queued.webhooks:
        return "tasks have no callbacks"
    return None
