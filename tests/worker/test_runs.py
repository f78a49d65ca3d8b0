"""Shards of a large job go several to a task; what a task does not get to, others do."""

import os
import signal
import subprocess

import pytest

from cwpo_worker import planner, tasks
from cwpo_worker.queue import Task, shard_tasks
from cwpo_worker.reconciler import reconcile

JOB = f"job-{'a' * 24}"


@pytest.fixture
def large(house, monkeypatch):
    """A planned job of 64 shards of two rows, two to a task, and its rows."""
    monkeypatch.setattr("cwpo_worker.ledger.SHARD_ROWS", 2)
    rows = house.rows(128)
    job_id = house.submit(rows)
    planner.plan(house.ledger, job_id)
    house.ledger.queue.remove([Task(job_id, "plan")])
    return job_id, rows


def shards(tasks):
    return sorted(number for task in tasks for number in task.shards)


@pytest.mark.parametrize("count", [0, 1, 31, 64, 257, 4000])
def test_tasks_hold_each_shard_once_and_leave_work_for_many_workers(count):
    runs = shard_tasks(JOB, range(count), count)
    assert shards(runs) == list(range(count))
    assert len(runs) >= min(count, 32)
    assert all(Task.parse(task.id) == task for task in runs)


def test_only_neighbours_share_a_task():
    assert [str(task) for task in shard_tasks(JOB, [3, 4, 6, 9, 10, 11], 96)] == [
        "shard 3x2",
        "shard 6",
        "shard 9x3",
    ]


def test_a_large_job_is_done_in_few_tasks(house, large):
    job_id, rows = large
    waiting = house.ledger.queue.census().waiting
    assert len(waiting) == 32
    assert shards(waiting) == list(range(64))
    house.start_worker("--burst").wait()
    assert house.ledger.get(job_id, owner=None).state == "completed"
    assert house.results(job_id) == house.expected(rows)
    assert house.service.requests == 64


def test_a_worker_that_is_stopped_gives_back_what_it_has_not_begun(house, large):
    job_id, rows = large
    house.service.gate.clear()
    worker = house.start_worker()
    house.wait_for(job_id, lambda _: house.service.requests)
    worker.send_signal(signal.SIGTERM)
    house.service.gate.set()
    assert worker.wait(30) == 0
    done = set(house.ledger.records.parts(job_id))
    assert done == {0}
    census = house.ledger.queue.census()
    assert shards(census.waiting) == sorted(set(range(64)) - done)
    assert house.ledger.queue.rq.job_ids[0] == Task(job_id, "shard", 1).id
    house.start_worker("--burst").wait()
    assert house.results(job_id) == house.expected(rows)
    assert house.service.requests == 64


def test_a_slow_task_leaves_its_other_shards_to_others(house, large, monkeypatch):
    job_id, _ = large
    monkeypatch.setattr(tasks, "RUN_SECONDS", 0.0)
    tasks.equip(tasks.Tools(house.ledger, house.client))
    house.ledger.queue.rq.empty()
    tasks.shard(job_id, 8, 4)
    assert set(house.ledger.records.parts(job_id)) == {8}
    waiting = house.ledger.queue.census().waiting
    assert waiting == {Task(job_id, "shard", number) for number in (9, 10, 11)}


def test_the_tasks_of_lost_shards_are_made_anew(house, large):
    job_id, _ = large
    tasks.equip(tasks.Tools(house.ledger, house.client))
    tasks.shard(job_id, 4, 1)
    house.ledger.queue.remove([Task(job_id, "shard", 4, 2), Task(job_id, "shard", 12, 2)])
    reconcile(house.ledger)
    waiting = house.ledger.queue.census().waiting
    assert {str(task) for task in waiting} >= {"shard 5", "shard 12x2"}
    assert shards(waiting) == sorted(set(range(64)) - {4})


def test_a_task_dies_with_its_worker(house, large):
    job_id, _ = large
    house.service.gate.clear()
    worker = house.start_worker()
    house.wait_for(job_id, lambda _: house.service.requests)
    found = subprocess.run(
        ["pgrep", "-P", str(worker.pid)], capture_output=True, text=True, check=True
    )
    (task,) = map(int, found.stdout.split())
    worker.kill()
    worker.wait()
    house.wait_for(job_id, lambda _: not is_running(task))
    house.service.gate.set()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
