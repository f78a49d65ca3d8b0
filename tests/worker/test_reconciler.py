"""What is left undone by a kill, a crash, a full disk or a lost Redis is done all the same."""

import os
import signal
import subprocess
import time

import pytest
from rq.job import Job as QueuedTask
from rq.serializers import JSONSerializer

from cwpo_worker import planner, shard
from cwpo_worker.commands import Worker
from cwpo_worker.queue import RETRY_SECONDS, Task
from cwpo_worker.reconciler import INTERVAL_SECONDS, LOCK, LOCK_SECONDS, reconcile

RQ_QUEUE = "rq:queue:cwpo"
STARTED = "rq:wip:cwpo"


def waiting(house):
    return sorted(str(task) for task in house.ledger.queue.census().waiting)


def running(house):
    return sorted(str(task) for task in house.ledger.queue.census().running)


def undisturbed(house, job_id, rows):
    job = house.wait(job_id)
    assert job.state == "completed", job.error
    assert house.results(job_id) == house.expected(rows)
    assert house.errors(job_id) == []


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
    house.redis.zadd(STARTED, {entry: 1})  # Its last sign of life is long ago.
    reconcile(house.ledger)
    assert (running(house), waiting(house)) == ([], ["shard 0"])
    house.service.gate.set()


def test_a_dead_workers_task_is_with_others_within_half_a_minute():
    heartbeat = Worker.model_fields["heartbeat_seconds"].default
    # Found silent in one round, due after the first pause, and queued in the round after that.
    assert heartbeat + 2 * INTERVAL_SECONDS + RETRY_SECONDS[0] < 30
    assert heartbeat > LOCK_SECONDS


def test_a_job_that_moves_on_during_the_census_is_merged_once(house, monkeypatch):
    rows = house.rows(10)
    job_id = house.submit(rows)
    house.redis.delete(RQ_QUEUE)
    planner.plan(house.ledger, job_id)
    census = house.ledger.queue.census

    def slow_census():
        before = census()
        shard.annotate(house.ledger, house.client, job_id, 0)
        return before

    monkeypatch.setattr(house.ledger.queue, "census", slow_census)
    reconcile(house.ledger)
    queued = house.redis.lrange(RQ_QUEUE, 0, -1)
    assert queued.count(Task(job_id, "merge").id.encode()) == 1
    monkeypatch.undo()
    house.start_worker("--burst").wait()
    undisturbed(house, job_id, rows)


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


def test_a_job_goes_on_when_redis_has_forgotten_it(house):
    rows = house.rows(5000)
    job_id = house.submit(rows)
    planner.plan(house.ledger, job_id)
    shard.annotate(house.ledger, house.client, job_id, 0)
    requests = house.service.requests
    house.redis.flushall()
    house.start_worker()
    deadline = time.monotonic() + 30
    while not house.redis.exists(f"cwpo:job:{job_id}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    undisturbed(house, job_id, rows)
    assert house.service.requests == requests + 6  # The finished shard was not asked again.


def test_redis_forgetting_everything_under_a_working_worker_loses_nothing(house):
    rows = house.rows(5000)
    job_id = house.submit(rows)
    house.service.gate.clear()
    house.start_worker()
    house.wait_for(job_id, lambda _: running(house) == ["shard 0"] and house.service.requests)
    house.redis.flushall()
    house.service.gate.set()
    deadline = time.monotonic() + 30
    while not house.redis.exists(f"cwpo:job:{job_id}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    undisturbed(house, job_id, rows)


def test_ended_jobs_are_remembered_when_redis_has_forgotten_them(house):
    done, cancelled = house.submit(b"no json\n"), house.submit(house.rows(1))
    house.ledger.cancel(cancelled, owner=None)
    house.start_worker("--burst").wait()
    before = house.ledger.list(owner=None, state=None, limit=9, cursor=None)
    assert [job.state for job in before.jobs] == ["cancelled", "completed_with_errors"]
    house.redis.flushall()
    reconcile(house.ledger)
    assert house.ledger.list(owner=None, state=None, limit=9, cursor=None) == before
    assert waiting(house) == []
    assert len(house.errors(done)) == 1


@pytest.mark.parametrize("step", ["plan", "shards", "merge"])
def test_a_task_that_the_queue_has_lost_is_queued_again(house, step):
    job_id = house.submit(house.rows(2100))
    if step != "plan":
        planner.plan(house.ledger, job_id)
    if step == "merge":
        for index in (0, 1):
            shard.annotate(house.ledger, house.client, job_id, index)
    house.ledger.queue.rq.empty()
    reconcile(house.ledger)
    expected = {"plan": ["plan"], "shards": ["shard 0", "shard 1"], "merge": ["merge"]}[step]
    assert waiting(house) == expected
    reconcile(house.ledger)
    assert len(house.ledger.queue.rq) == len(expected)


def test_a_task_that_died_between_queue_and_start_is_queued_again(house, monkeypatch):
    monkeypatch.setattr("cwpo_worker.queue.LIMBO_SECONDS", 0.2)
    house.submit(house.rows(1))
    queue = house.ledger.queue.rq
    house.redis.lmove(queue.key, queue.intermediate_queue_key)
    reconcile(house.ledger)
    assert len(queue) == 0
    time.sleep(0.3)
    reconcile(house.ledger)
    assert len(queue) == 1
    assert house.redis.llen(queue.intermediate_queue_key) == 0


def test_a_service_that_is_away_is_waited_for(house):
    rows = house.rows(300)
    job_id = house.submit(rows)
    house.service.unavailable = True
    house.start_worker()
    house.wait_for(job_id, lambda _: len(house.ledger.queue.rq.scheduled_job_registry))
    assert house.ledger.get(job_id, owner=None).state == "running"
    house.service.unavailable = False
    undisturbed(house, job_id, rows)


def test_a_task_that_was_given_up_fails_its_job_with_the_reason(house):
    job_id = house.submit(house.rows(10))
    planner.plan(house.ledger, job_id)
    house.ledger.store.put(f"jobs/{job_id}/shards/00000.parquet", b"damaged\n")
    queued = QueuedTask.fetch(Task(job_id, "shard", 0).id, house.redis, JSONSerializer)
    queued.retries_left = 0
    queued.save()
    house.start_worker()
    job = house.wait(job_id)
    assert job.state == "failed"
    assert job.error == (
        "shard 0 was given up: a shard in the store is damaged: it is no table of rows"
    )


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
    house.ledger.queue.rq.empty()
    lock = house.redis.lock("cwpo:reconciler", timeout=60)
    assert lock.acquire(blocking=False)
    reconcile(house.ledger)
    assert waiting(house) == []
    lock.release()
    reconcile(house.ledger)
    assert waiting(house) == ["plan"]
