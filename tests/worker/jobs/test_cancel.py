"""A cancelled job publishes what it has finished, and does the rest when it is resumed."""

import pytest

from cwpo_worker.errors import IllegalTransitionError, JobStoppedError
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.queue.task_queue import Task


@pytest.fixture
def begun(house):
    """A job of three shards, the second finished, with a rejected row; and its good rows."""
    rows = house.rows(5000)
    job_id = house.submit([*rows[:3000], {"prompt": "alone"}, *rows[3000:]])
    house.plan(job_id)
    house.annotate(job_id, 1)
    return job_id, rows


def cancel(house, job_id):
    """The cancelled job, by way of the reconciler and a merge."""
    assert house.ledger.cancel(job_id, owner=None).state == "cancelling"
    house.reconcile()
    assert house.queue.census().of(job_id) == {Task(job_id, "merge")}
    house.merge(job_id)
    return house.ledger.get(job_id, owner=None)


def counts(job):
    progress = job.progress
    return (
        progress.rows_total,
        progress.rows_done,
        progress.rows_annotated,
        progress.rows_failed,
    )


def test_what_a_cancelled_job_has_finished_are_its_results(house, begun):
    job_id, rows = begun
    job = cancel(house, job_id)
    assert (job.state, job.error, job.progress.eta_seconds) == ("cancelled", None, None)
    assert counts(job) == (5001, 2049, 2048, 1)
    assert house.results(job_id) == house.expected(rows[2048:4096])
    assert [error["row"] for error in house.errors(job_id)] == [3001]


@pytest.mark.slow
def test_a_worker_publishes_them(house, begun):
    job_id, rows = begun
    house.ledger.cancel(job_id, owner=None)
    house.start_worker("--burst").wait()
    assert house.ledger.get(job_id, owner=None).state == "cancelled"
    assert house.results(job_id) == house.expected(rows[2048:4096])


@pytest.mark.slow
def test_resumed_it_does_only_what_is_missing(house, begun):
    job_id, rows = begun
    cancel(house, job_id)
    asked = house.service.requests
    resumed = house.ledger.resume(job_id, owner=None)
    assert (resumed.state, resumed.finished_at, counts(resumed)) == (
        "validating",
        None,
        (None, 0, 0, 0),
    )
    assert house.ledger.resume(job_id, owner=None) == resumed
    with pytest.raises(IllegalTransitionError, match="no results yet"):
        house.results(job_id)
    house.start_worker("--burst").wait()
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, counts(job)) == ("completed_with_errors", (5001, 5001, 5000, 1))
    assert house.results(job_id) == house.expected(rows)
    assert house.service.requests == asked + 6
    with pytest.raises(IllegalTransitionError, match="only a failed or cancelled job"):
        house.ledger.resume(job_id, owner=None)


def test_cancelled_again_it_has_more(house, begun):
    job_id, rows = begun
    cancel(house, job_id)
    house.ledger.resume(job_id, owner=None)
    house.plan(job_id)
    for index in (0, 1):
        house.annotate(job_id, index)
    assert counts(cancel(house, job_id)) == (5001, 4097, 4096, 1)
    assert house.results(job_id) == house.expected(rows[:4096])


def test_a_shard_that_is_finished_late_is_left_for_the_resumption(house, begun):
    job_id, rows = begun
    house.ledger.cancel(job_id, owner=None)
    record = house.registry.get(job_id)
    house.merge(job_id)
    before = house.results(job_id)
    # A twin of the merge, of which one more shard is there by now.
    store = house.store
    with store.create(JobFolder(job_id).part(0)) as sink:
        sink.write(store.read(JobFolder(job_id).part(1)))
    house.redis.set(f"cwpo:job:{job_id}", record.model_dump_json())
    house.merge(job_id)
    assert house.results(job_id) == before == house.expected(rows[2048:4096])


def test_without_a_finished_shard_a_job_is_cancelled_at_once_and_has_no_results(house):
    job_id = house.submit(house.rows(5000))
    house.plan(job_id)
    assert house.ledger.cancel(job_id, owner=None).state == "cancelled"
    with pytest.raises(IllegalTransitionError, match="is cancelled: it has no results"):
        house.results(job_id)
    with pytest.raises(JobStoppedError):
        house.merge(job_id)


@pytest.mark.slow
def test_parts_that_cannot_be_published_do_not_hold_a_job_up(house, begun):
    job_id, _ = begun
    store, folder = house.store, JobFolder(job_id)
    house.annotate(job_id, 2)
    store.put(folder.part(1), store.read(folder.part(2)))
    house.ledger.cancel(job_id, owner=None)
    house.start_worker("--burst").wait()
    job = house.ledger.get(job_id, owner=None)
    assert job.state == "cancelled"
    assert job.error.startswith("what was finished cannot be published: part 2 begins ")
