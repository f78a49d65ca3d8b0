"""Shards of a large job go several to a task; what a task does not get to, others do."""

import os
import subprocess
import threading
from contextlib import suppress
from datetime import timedelta

import pyarrow.parquet as pq
import pytest

from cwpo.datasets.weighted import annotator_of
from cwpo.types import ModelRef
from cwpo_worker import tasks
from cwpo_worker.errors import IllegalTransitionError, JobStoppedError
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.queue.task_queue import Task
from harness import TIMEOUT


@pytest.fixture
def large(house, monkeypatch):
    """A planned job of 64 shards of two rows, two to a task, and its rows."""
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 2)
    rows = house.rows(128)
    job_id = house.submit(rows)
    house.plan(job_id)
    house.queue.remove([Task(job_id, "plan")])
    return job_id, rows


def equip(house, model_wait=timedelta(hours=1)):
    tasks.equip(tasks.Tools(house.lifecycle, house.store, house.client, model_wait))


def finished(house, job_id):
    return {index for index in range(64) if house.finished.contains(job_id, index)}


@pytest.mark.slow
def test_a_large_job_is_done_in_few_tasks(house, large):
    job_id, rows = large
    # Two were queued when few shards were planned.
    assert house.ledger.totals().unqueued == 16
    house.start_worker("--burst").wait()
    assert house.ledger.get(job_id, owner=None).state == "completed"
    assert house.results(job_id) == house.expected(rows)
    assert house.service.requests == 64


@pytest.mark.slow
def test_a_worker_that_is_stopped_gives_back_what_it_has_not_begun(house, large):
    job_id, rows = large
    house.service.gate.clear()
    worker = house.start_worker()
    house.wait_for(job_id, lambda _: house.service.requests)
    house.end_after_this_shard(worker)
    house.service.gate.set()
    assert worker.wait(TIMEOUT) == 0
    assert finished(house, job_id) == {0}
    house.start_worker("--burst").wait()
    assert house.results(job_id) == house.expected(rows)
    assert house.service.requests == 64


def test_a_slow_task_leaves_its_other_shards_to_others(house, large, monkeypatch):
    job_id, _ = large
    monkeypatch.setattr(tasks, "RUN_SECONDS", 0.0)
    equip(house)
    house.queue.rq.empty()
    tasks.shard(job_id, 8, 4)
    assert finished(house, job_id) == {8}


@pytest.mark.slow
def test_the_tasks_of_lost_shards_are_made_anew(house, large):
    job_id, rows = large
    equip(house)
    tasks.shard(job_id, 4, 1)
    house.queue.remove([Task(job_id, "shard", 1, 1)])
    house.reconcile()
    assert house.queue.census().waiting == {
        Task(job_id, "shard", 0, 1),
        Task(job_id, "shard", 1, 4),
    }
    house.start_worker("--burst").wait()
    assert house.results(job_id) == house.expected(rows)
    assert house.service.requests == 64


OTHER = ModelRef(name="null", revision="other")


def test_a_shard_waits_for_the_revision_of_its_job_and_the_job_says_so(house, large):
    job_id, _ = large
    equip(house)
    assert tasks.shard(job_id, 0, 1) is None
    house.service.model = OTHER
    for index in (1, 2):
        assert tasks.shard(job_id, index, 1).max > 1000
        job = house.ledger.get(job_id, owner=None)
        assert (job.state, job.waiting.reason) == ("running", "this replica hosts other, not null")
    assert house.ledger.totals().waiting_for_model == 1
    requests = house.service.requests
    tasks.shard(job_id, 1, 1)
    assert house.service.requests == requests  # It does not send rows to be refused.
    house.service.reset()
    assert tasks.shard(job_id, 1, 1) is None
    assert house.ledger.get(job_id, owner=None).waiting is None
    assert finished(house, job_id) == {0, 1}
    assert house.ledger.totals().waiting_for_model == 0


def test_a_job_that_waits_for_too_long_names_both_revisions_and_the_way_out(house, large):
    job_id, _ = large
    tasks_of(house, job_id, 0)
    house.service.model = OTHER
    equip(house, timedelta(0))
    tasks.shard(job_id, 1, 1)
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.waiting, job.progress.rows_done) == ("failed", None, 2)
    assert "annotator null null" in job.error
    assert "this replica hosts other, not null" in job.error
    assert f"`cwpo jobs resume {job_id} --repin`" in job.error
    assert house.ledger.resume(job_id, owner=None).model.revision == "null"


def test_a_job_that_is_pinned_anew_keeps_nothing_of_what_was_done(house, large):
    job_id, rows = large
    tasks_of(house, job_id, *range(63))
    with pytest.raises(IllegalTransitionError, match="is running: cancel it before"):
        house.ledger.resume(job_id, owner=None, repin=True)
    house.lifecycle.fail(job_id, "its annotator is gone")
    house.service.model = OTHER
    job = house.ledger.resume(job_id, owner=None, repin=True)
    assert (job.model, job.progress.rows_done) == (None, 0)
    house.plan(job_id)
    tasks_of(house, job_id, *range(64))
    house.merge(job_id)
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.model) == ("completed", OTHER)
    assert house.results(job_id) == house.expected(rows)
    with house.ledger.open_results(job_id, "parquet", owner=None).stream as stream:
        assert annotator_of(pq.read_schema(stream)) == OTHER


def test_a_task_of_before_a_job_was_pinned_anew_changes_nothing(house, large):
    job_id, _ = large
    house.service.gate.clear()
    late = threading.Thread(target=tasks_of, args=[house, job_id, 0])
    late.start()
    house.wait_for(job_id, lambda _: house.service.requests)
    house.lifecycle.fail(job_id, "its annotator is gone")
    house.ledger.resume(job_id, owner=None, repin=True)
    house.plan(job_id)
    house.lifecycle.start_running(job_id)
    house.service.gate.set()
    late.join()
    record = house.registry.get(job_id)
    assert (record.state, record.model) == ("running", None)
    assert finished(house, job_id) == set()
    assert house.store.list(record.folder.parts) == []


def tasks_of(house, job_id, *indices):
    """Do these shards, each with a task of its own."""
    for index in indices:
        with suppress(JobStoppedError):
            house.annotate(job_id, index)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "left"), [((), 2), (("--discard-shards",), 0)])
def test_shards_go_with_publication_if_that_is_the_policy(house, flags, left):
    rows = house.rows(2100)
    job_id = house.submit(rows)
    assert house.start_worker("--burst", *flags).wait(TIMEOUT) == 0
    assert house.results(job_id) == house.expected(rows)
    assert len(house.store.list(JobFolder(job_id).shards)) == left
