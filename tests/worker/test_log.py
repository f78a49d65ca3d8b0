"""What a worker writes on stderr: plain lines, and never a row."""

import os
import signal
import subprocess

import pytest

from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.queue.task_queue import Task
from harness import TIMEOUT


@pytest.fixture
def log(tmp_path):
    """`log(worker)`: the lines that the worker, told to stop, has written by its end."""
    path = tmp_path / "stderr"

    def read(worker):
        worker.send_signal(signal.SIGTERM)
        worker.wait(TIMEOUT)
        text = path.read_text()
        assert "question" not in text
        return text.splitlines()

    read.path = path
    return read


@pytest.fixture
def worker(house, log):
    with log.path.open("wb") as stderr:
        yield house.start_worker(stderr=stderr)


def planned(house):
    job_id = house.submit(house.rows(10))
    house.plan(job_id)
    house.queue.remove([Task(job_id, "plan")])
    return job_id


def failed_once(house):
    return len(house.queue.rq.scheduled_job_registry)


@pytest.mark.slow
def test_a_service_that_is_away_is_a_line_and_a_job_that_goes_well_is_none(house, worker, log):
    house.service.unavailable = True
    job_id = house.submit(house.rows(10))
    house.wait_for(job_id, lambda _: failed_once(house))
    house.service.unavailable = False
    assert house.wait(job_id).state == "completed"
    assert house.wait(house.submit(house.rows(10))).state == "completed"
    lines = log(worker)
    assert lines
    for line in lines:
        assert f"shard 0 of {job_id} waits for the service: 503 " in line
        assert line.endswith("; it is tried again within 30 s")


@pytest.mark.slow
def test_a_key_that_the_service_does_not_know_yet_is_waited_for(house, worker, log):
    house.service.keys = ["Bearer another"]
    job_id = house.submit(house.rows(10))
    house.wait_for(job_id, lambda _: failed_once(house))
    assert house.ledger.totals().refused == 1
    assert house.ledger.get(job_id, owner=None).state == "running"
    house.service.keys = None
    assert house.wait(job_id).state == "completed"
    (line, *_) = log(worker)
    assert f"shard 0 of {job_id} waits for the service: 401 " in line


@pytest.mark.slow
def test_a_job_cancelled_under_its_task_is_a_line(house, worker, log):
    house.service.gate.clear()
    job_id = house.submit(house.rows(3000))
    house.wait_for(job_id, lambda _: house.service.requests)
    house.ledger.cancel(job_id, owner=None)
    house.service.gate.set()
    house.wait(job_id)
    (line,) = log(worker)
    assert line.endswith(f"shard 0 of {job_id} is not needed any more: job {job_id} is cancelling")


@pytest.mark.slow
def test_a_damaged_store_is_a_line_that_says_when_it_is_tried_again(house, log):
    job_id = planned(house)
    house.store.put(JobFolder(job_id).shard(0), b"question")
    with log.path.open("wb") as stderr:
        worker = house.start_worker(stderr=stderr)
    house.wait_for(job_id, lambda _: failed_once(house))
    line = log(worker)[0]
    assert f"shard 0 of {job_id} failed: a shard in the store is damaged" in line
    assert line.endswith("; it is tried again in 1 s")


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_keeps_its_trace_and_shows_no_row(house, log):
    job_id = planned(house)
    house.store.put(JobFolder(job_id).manifest, b'{"job_id": ["question"]}')
    with log.path.open("wb") as stderr:
        worker = house.start_worker(stderr=stderr)
    house.wait_for(job_id, lambda _: failed_once(house))
    first, second, *_ = log(worker)
    assert f"shard 0 of {job_id} failed: ValidationError; it is tried again in 1 s" in first
    assert second.startswith('  File "')


@pytest.mark.slow
def test_a_task_that_is_killed_is_a_line(house, worker, log):
    house.service.gate.clear()
    job_id = house.submit(house.rows(10))
    house.wait_for(job_id, lambda _: house.service.requests)
    found = subprocess.run(
        ["pgrep", "-P", str(worker.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(found.stdout), signal.SIGKILL)
    house.service.gate.set()
    house.wait(job_id)
    (line,) = log(worker)
    assert f"shard 0 of {job_id}: its process was ended by signal 9; it is tried again" in line


@pytest.mark.slow
def test_a_queue_that_is_away_is_lines_and_no_trace(house, worker, log):
    house.wait(house.submit(house.rows(10)))
    house.valkey.stop()
    lines = log(worker)
    assert lines
    assert not any(line.startswith(("Traceback", "  File")) for line in lines)
