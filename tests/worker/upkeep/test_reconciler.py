"""What is left undone by a kill, a crash, a full disk or a lost Redis is done all the same."""

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from select import select
from urllib.parse import urlsplit

import pytest
from rq.executions import Execution
from rq.job import Job as QueuedTask
from rq.serializers import JSONSerializer

from cwpo_worker.commands import Worker
from cwpo_worker.queue.task_queue import MAX_LOSSES, RETRY_SECONDS, Task
from cwpo_worker.upkeep.reconciler import INTERVAL_SECONDS, LOCK, LOCK_SECONDS
from harness import TIMEOUT

RQ_QUEUE = "rq:queue:cwpo"
STARTED = "rq:wip:cwpo"


def waiting(house):
    return sorted(str(task) for task in house.queue.census().waiting)


def running(house):
    return sorted(str(task) for task in house.queue.census().running)


def undisturbed(house, job_id, rows):
    job = house.wait(job_id)
    assert job.state == "completed", job.error
    assert house.results(job_id) == house.expected(rows)
    assert house.errors(job_id) == []


@pytest.mark.slow
def test_a_worker_killed_in_a_shard_loses_nothing(house):
    rows = house.rows(5000)
    job_id = house.submit(rows)
    house.service.gate.clear()
    killed = house.start_worker("--heartbeat-seconds", "3")
    house.wait_for(job_id, lambda _: running(house) == ["shard 0"] and house.service.requests)
    # The worker and the child at work are in one session, but in groups of their own.
    for pid in children(killed.pid):
        os.kill(pid, signal.SIGKILL)
    killed.kill()
    killed.wait()
    house.service.gate.set()
    house.start_worker("--heartbeat-seconds", "3")
    undisturbed(house, job_id, rows)


@pytest.mark.slow
def test_a_worker_whose_search_for_lost_tasks_fails_ends_and_says_so(house, capfd):
    house.redis.sadd("cwpo:jobs:active", b"\xff")
    worker = house.start_worker()
    assert worker.wait(TIMEOUT) == 1
    printed = capfd.readouterr().err
    assert "the search for lost tasks failed: UnicodeDecodeError" in printed
    assert printed.strip().endswith("the worker ends: its search for lost tasks failed")


@pytest.mark.slow
def test_a_task_whose_worker_is_silent_waits_for_another_after_one_round(house):
    job_id = house.submit(house.rows(10))
    house.service.gate.clear()
    silent = house.start_worker()
    house.wait_for(job_id, lambda _: running(house) == ["shard 0"] and house.service.requests)
    os.killpg(silent.pid, signal.SIGSTOP)
    for child in children(silent.pid):
        os.kill(child, signal.SIGSTOP)
    (entry,) = house.redis.zrange(STARTED, 0, -1)
    house.redis.delete(LOCK)  # The silent one may have been at it.
    house.redis.delete(f"rq:execution:{entry.decode()}")  # Its last sign of life has expired.
    house.reconcile()
    assert (running(house), waiting(house)) == ([], ["shard 0"])
    house.service.gate.set()


def test_a_dead_workers_task_is_with_others_within_half_a_minute():
    heartbeat = Worker.model_fields["heartbeat_seconds"].default
    assert heartbeat + INTERVAL_SECONDS < 30
    assert heartbeat > LOCK_SECONDS


def begun(house):
    """The first task in line, begun by a worker: what RQ keeps of it."""
    task_id = house.redis.lpop(RQ_QUEUE).decode()
    queued = QueuedTask.fetch(task_id, house.redis, JSONSerializer)
    with house.redis.pipeline() as pipe:
        execution = Execution.create(queued, ttl=60, pipeline=pipe)
        pipe.execute()
    return execution


@pytest.mark.slow
def test_no_number_of_lost_workers_spends_the_retries_of_a_task(house):
    job_id = house.submit(house.rows(10))
    for _ in range(2 * len(RETRY_SECONDS)):
        house.redis.delete(begun(house).key)
        house.reconcile()
        assert (running(house), waiting(house)) == ([], ["plan"])
    queued = QueuedTask.fetch(Task(job_id, "plan").id, house.redis, JSONSerializer)
    assert queued.retries_left == len(RETRY_SECONDS)
    house.work()
    house.work()
    assert house.ledger.get(job_id, owner=None).state == "completed"


def test_a_task_that_ends_every_worker_fails_its_job(house):
    job_id = house.submit(house.rows(10))
    for _ in range(MAX_LOSSES):
        assert house.ledger.get(job_id, owner=None).state == "validating"
        house.redis.delete(begun(house).key)
        house.reconcile()
    job = house.ledger.get(job_id, owner=None)
    assert job.state == "failed"
    assert job.error == "plan was given up: 100 workers were lost while they had it"


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_the_clock_of_a_worker_does_not_matter(house, seconds):
    house.submit(house.rows(10))
    execution = begun(house)
    house.redis.zadd(STARTED, {execution.composite_key: time.time() + seconds})
    house.reconcile()
    assert (running(house), waiting(house)) == (["plan"], [])
    house.redis.delete(execution.key)
    house.reconcile()
    assert (running(house), waiting(house)) == ([], ["plan"])


class LateAnswer:
    """A way to a Valkey server on which one answer is late.

    Args:
        url: of the server.
        asked: bytes of the command whose answer it is.
        meanwhile: what happens after the server gave the answer, and before it arrives.
    """

    def __init__(self, url, asked, meanwhile):
        self._server = urlsplit(url)
        self._asked = asked
        self._meanwhile = meanwhile
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = url.replace(f":{self._server.port}", f":{port}")

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=[client], daemon=True).start()

    def _pass_on(self, client):
        address = (self._server.hostname, self._server.port)
        is_asked = False
        with client, socket.create_connection(address) as server:
            while True:
                for source in select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is client:
                        is_asked = is_asked or self._asked in data
                        server.sendall(data)
                        continue
                    if is_asked and self._meanwhile is not None:
                        meanwhile, self._meanwhile = self._meanwhile, None
                        meanwhile()
                    client.sendall(data)


@pytest.mark.slow
def test_a_job_that_moves_on_during_the_census_is_merged_once(house):
    rows = house.rows(10)
    job_id = house.submit(rows)
    house.redis.delete(RQ_QUEUE)
    house.plan(job_id)
    # Of a round's commands that of the first census is the first to read the list of the tasks
    # just taken.
    census = house.queue.rq.intermediate_queue_key.encode()
    with LateAnswer(house.valkey.url, census, lambda: house.annotate(job_id, 0)) as late:
        house.reconcile(redis_url=late.url)
    assert house.finished.count(job_id) == 1
    queued = house.redis.lrange(RQ_QUEUE, 0, -1)
    assert queued.count(Task(job_id, "merge").id.encode()) == 1
    house.start_worker("--burst").wait()
    undisturbed(house, job_id, rows)


@pytest.mark.slow
def test_a_task_killed_under_its_worker_is_run_again(house):
    rows = house.rows(300)
    job_id = house.submit(rows)
    house.service.gate.clear()
    worker = house.start_worker()
    house.wait_for(job_id, lambda _: running(house) == ["shard 0"] and house.service.requests)
    (child,) = children(worker.pid)
    os.kill(child, signal.SIGKILL)
    house.service.gate.set()
    undisturbed(house, job_id, rows)


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_a_job_goes_on_when_redis_has_forgotten_it(house):
    rows = house.rows(5000)
    job_id = house.submit(rows)
    house.plan(job_id)
    house.annotate(job_id, 0)
    requests = house.service.requests
    house.redis.flushall()
    house.start_worker()
    deadline = time.monotonic() + TIMEOUT
    while not house.redis.exists(f"cwpo:job:{job_id}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    undisturbed(house, job_id, rows)
    assert house.service.requests == requests + 6  # The finished shard was not asked again.


@pytest.mark.slow
def test_redis_forgetting_everything_under_a_working_worker_loses_nothing(house):
    rows = house.rows(5000)
    job_id = house.submit(rows)
    house.service.gate.clear()
    house.start_worker()
    house.wait_for(job_id, lambda _: running(house) == ["shard 0"] and house.service.requests)
    house.redis.flushall()
    house.service.gate.set()
    deadline = time.monotonic() + TIMEOUT
    while not house.redis.exists(f"cwpo:job:{job_id}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    undisturbed(house, job_id, rows)


@pytest.mark.slow
def test_ended_jobs_are_remembered_when_redis_has_forgotten_them(house):
    done, cancelled = house.submit(b"no json\n"), house.submit(house.rows(1))
    house.ledger.cancel(cancelled, owner=None)
    house.start_worker("--burst").wait()
    before = house.ledger.list(owner=None, state=None, limit=9, cursor=None)
    assert [job.state for job in before.jobs] == ["cancelled", "completed_with_errors"]
    house.redis.flushall()
    house.reconcile()
    assert house.ledger.list(owner=None, state=None, limit=9, cursor=None) == before
    assert waiting(house) == []
    assert len(house.errors(done)) == 1


@pytest.mark.parametrize("step", ["plan", "shards", "merge"])
def test_a_task_that_the_queue_has_lost_is_queued_again(house, step):
    job_id = house.submit(house.rows(2100))
    if step != "plan":
        house.plan(job_id)
    if step == "merge":
        for index in (0, 1):
            house.annotate(job_id, index)
    house.queue.rq.empty()
    house.reconcile()
    expected = {"plan": ["plan"], "shards": ["shard 0", "shard 1"], "merge": ["merge"]}[step]
    assert waiting(house) == expected
    house.reconcile()
    assert len(house.queue.rq) == len(expected)


def test_a_task_that_died_between_queue_and_start_is_queued_again(house, monkeypatch):
    house.submit(house.rows(1))
    queue = house.queue.rq
    house.redis.lmove(queue.key, queue.intermediate_queue_key)
    house.reconcile()
    assert len(queue) == 0
    monkeypatch.setattr("cwpo_worker.queue.task_queue.INTERMEDIATE_SECONDS", 0.0)
    house.reconcile()
    assert len(queue) == 1
    assert house.redis.llen(queue.intermediate_queue_key) == 0


@pytest.mark.slow
def test_a_service_that_is_away_is_waited_for(house):
    rows = house.rows(300)
    job_id = house.submit(rows)
    house.service.unavailable = True
    house.start_worker()
    house.wait_for(job_id, lambda _: len(house.queue.rq.scheduled_job_registry))
    assert house.ledger.get(job_id, owner=None).state == "running"
    house.service.unavailable = False
    undisturbed(house, job_id, rows)


@pytest.mark.slow
def test_a_task_that_was_given_up_fails_its_job_with_the_reason(house):
    job_id = house.submit(house.rows(10))
    house.plan(job_id)
    house.store.put(f"jobs/{job_id}/shards/00000.parquet", b"damaged\n")
    queued = QueuedTask.fetch(Task(job_id, "shard", 0).id, house.redis, JSONSerializer)
    queued.retries_left = 0
    queued.save()
    house.start_worker()
    job = house.wait(job_id)
    assert job.state == "failed"
    assert job.error == (
        "shard 0 was given up: a shard in the store is damaged: it is no table of rows"
    )


@pytest.mark.slow
def test_a_full_disk_fails_the_job_with_one_line_and_leaves_no_results(house, tmp_path):
    folder = house.store_folder
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        job_id = house.submit(house.rows(2100))
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        # What is left is enough for records, and not for a shard.
        (folder / "ballast").write_bytes(b"\0" * (free - 12288))
        queued = QueuedTask.fetch(Task(job_id, "plan").id, house.redis, JSONSerializer)
        queued.retries_left = 0
        queued.save()
        house.start_worker()
        job = house.wait(job_id)
        assert job.state == "failed"
        assert job.error.startswith("plan was given up: cannot write ")
        assert job.error.endswith(": No space left on device")
        assert not (folder / "jobs" / job_id / "manifest.json").exists()
    finally:
        house.close()
        subprocess.run(["umount", str(folder)], check=True)


def test_one_reconciles_at_a_time(house):
    house.submit(house.rows(1))
    house.queue.rq.empty()
    lock = house.redis.lock("cwpo:reconciler", timeout=60)
    assert lock.acquire(blocking=False)
    house.reconcile()
    assert waiting(house) == []
    lock.release()
    house.reconcile()
    assert waiting(house) == ["plan"]
