"""RQ's worker, which runs allowed tasks only, loses no task at its end, and logs plain lines."""

from __future__ import annotations

import logging
import os
import resource
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
import rq
from rq import worker_registration
from rq.job import Job as QueuedTask
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from cwpo.errors import CwpoError, first_line
from cwpo.process import die_with_parent
from cwpo_worker.queue.task_queue import ALLOWED, Task, TaskQueue

WIND_DOWN = signal.SIGUSR1
# Memory of a task in bytes, in addition to that of its worker.
TASK_BYTES = 768 << 20
# While no task comes: RQ's worker waits for one 15 s less than this, and then gives a sign of life.
_IDLE_SECONDS = 45
# Per core, since pyarrow starts a thread on each, whose whole stack counts as memory.
_THREAD_BYTES = 16 << 20

log = logging.getLogger(__name__)


class TaskWorker(rq.Worker):
    """RQ's forking worker, which refuses everything in the queue that is not an allowed task.

    A task ends with its worker. On SIGTERM both end after the current shard.

    Args:
        heartbeat_seconds: time without a heartbeat after which its task is given to another worker.
        wind_down: tells the task, in its process, that the worker is about to end.
        heartbeat_file: touched at each sign of life, for probes; every minute or so even while
            Redis cannot be reached, which a new worker would not mend.
    """

    def __init__(
        self,
        queue: TaskQueue,
        heartbeat_seconds: int,
        wind_down: Callable[[], None],
        *,
        heartbeat_file: Path | None = None,
    ) -> None:
        self.heartbeat_seconds = heartbeat_seconds
        self._heartbeat_file = heartbeat_file
        self.was_stopped = False
        self._wind_down = wind_down
        self._die_with_worker = die_with_parent()
        # Until a task listens for it.
        signal.signal(WIND_DOWN, signal.SIG_IGN)
        logging.getLogger("rq.worker").addFilter(_plain)
        super().__init__(
            [queue.rq],
            connection=queue.rq.connection,
            serializer=JSONSerializer,
            job_monitoring_interval=max(1, heartbeat_seconds // 3),
            worker_ttl=_IDLE_SECONDS,
        )

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Give a sign of life: to those who look at the file, and to Redis."""
        if self._heartbeat_file is not None:
            # Without a file, a probe ends the worker; no task need fail for that.
            with suppress(OSError):
                self._heartbeat_file.touch()
        super().heartbeat(timeout, pipeline)

    def get_heartbeat_ttl(self, job: QueuedTask) -> int:
        """Seconds until the task counts as abandoned."""
        return self.heartbeat_seconds

    def clean_registries(self) -> None:
        """Remove dead workers from RQ's list of workers.

        Their tasks are left to the reconciler, since RQ compares heartbeats with the local clock.
        """
        for queue in self.queues:
            worker_registration.clean_worker_registry(queue)
        self.last_cleaned_at = datetime.now(UTC)  # type: ignore[assignment]

    def handle_warm_shutdown_request(self) -> None:
        """Record that the worker should end, and tell the task."""
        self.was_stopped = True
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, WIND_DOWN)

    def setup_work_horse_signals(self) -> None:
        """Handle signals in the process of a task: the worker's end."""
        super().setup_work_horse_signals()  # type: ignore[no-untyped-call]
        signal.signal(WIND_DOWN, lambda *_: self._wind_down())
        _bound_memory()
        if self._die_with_worker is not None:
            self._die_with_worker()

    def execute_job(self, job: QueuedTask, queue: rq.Queue) -> None:
        """Fork a process and run the task, unless it is refused."""
        refusal = _refusal(job)
        if refusal is None:
            super().execute_job(job, queue)
            return
        self.log.error("refused %s: %s", job.id, refusal)
        queue.intermediate_queue.remove(job.id)
        job.set_status(JobStatus.FAILED)
        queue.failed_job_registry.add(job, exc_string=f"refused: {refusal}")

    def handle_exception(self, job: QueuedTask, *exc_info: Any) -> None:
        """Log why the task failed: one line, or the stack of an unexpected error.

        The message of an unexpected error is left out, since it could quote a row.
        """
        error: BaseException = exc_info[1]
        if isinstance(error, CwpoError | redis.RedisError):
            log.warning("%s failed: %s; %s", _name(job), first_line(error), _what_next(job))
        else:
            trace = "".join(traceback.format_tb(error.__traceback__))
            kind = type(error).__name__
            log.error("%s failed: %s; %s\n%s", _name(job), kind, _what_next(job), trace)

    def handle_work_horse_killed(
        self, job: QueuedTask, retpid: int, ret_val: int, rusage: Any
    ) -> None:
        """Log that the process of the task was killed."""
        how = f"signal {os.WTERMSIG(ret_val)}" if os.WIFSIGNALED(ret_val) else f"status {ret_val}"
        log.warning("%s: its process was ended by %s; %s", _name(job), how, _what_next(job))


def _bound_memory() -> None:
    """Limit the memory of the task, on Linux.

    An input that needs more fails its task; without a limit, the system would kill workers.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return
    held = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
    threads = (os.cpu_count() or 1) * _THREAD_BYTES
    most = int(held.split()[1]) * 1024 + TASK_BYTES + threads
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _name(queued: QueuedTask) -> str:
    task = Task.parse(queued.id)
    return queued.id if task is None else f"{task} of {task.job_id}"


def _what_next(queued: QueuedTask) -> str:
    """What happens next to a task that failed; called before RQ requeues it."""
    if queued.should_retry:
        return f"it is tried again in {queued.get_retry_interval()} s"
    return "that was its last attempt, and its job fails"


def _plain(record: logging.LogRecord) -> bool:
    """A filter of RQ's log that reduces errors of Redis to one line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, redis.RedisError):
        record.msg, record.args = "the job queue cannot be used: %s", (first_line(error),)
        record.exc_info = None
    return True


def _refusal(queued: QueuedTask) -> str | None:
    """Why the task may not run; None if it may."""
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
