from datetime import timedelta

import pytest

from cwpo.types import JobRequest
from cwpo_worker.errors import (
    FileInUseError,
    IdempotencyConflictError,
    IllegalTransitionError,
    UnknownFileError,
    UnknownJobError,
)
from cwpo_worker.queue.task_queue import Task
from cwpo_worker.upkeep.retention import LOOKED

DAY = timedelta(days=1)


def carry_out(house, job_id):
    house.plan(job_id)
    house.annotate(job_id, 0)
    house.merge(job_id)


@pytest.fixture
def done(house):
    """The id of a completed job."""
    job_id = house.submit(house.rows(3))
    carry_out(house, job_id)
    return job_id


def age(house, days):
    """Make all that there is so much older."""
    then = timedelta(days=days)
    for _, record in house.registry.newest(None, None):
        if record.finished_at is not None:
            old = record.model_copy(update={"finished_at": record.finished_at - then})
            house.registry.change(record.id, lambda _, old=old: old)
    for file in house.files.all():
        key = f"files/{file.id}/file.json"
        old = file.model_copy(update={"created_at": file.created_at - then})
        house.store.put(key, old.model_dump_json().encode())
    house.redis.delete(LOOKED)


def left(house):
    return [
        *house.store.list("jobs"),
        *house.store.list("files"),
    ]


def test_deleted_jobs_are_gone_from_store_and_redis(house, done):
    house.ledger.delete(done, owner=None)
    with pytest.raises(UnknownJobError):
        house.ledger.get(done, owner=None)
    house.reconcile()
    assert house.store.list("jobs") == []
    assert [key for key in house.redis.keys("cwpo:*") if done.encode() in key] == []
    assert house.registry.deleted() == []


def test_a_deletion_outlives_a_lost_redis_and_is_finished_after_it(house, done):
    house.ledger.delete(done, owner=None)
    house.redis.flushall()
    house.reconcile()
    assert house.ledger.list(owner=None, state=None, limit=9, cursor=None).jobs == []
    assert house.store.list("jobs") == []


@pytest.mark.parametrize("state", ["validating", "queued", "running", "finalizing"])
def test_a_job_that_has_not_ended_is_not_deleted_nor_its_file(house, state):
    job_id = house.submit(house.rows(3))
    if state != "validating":
        house.plan(job_id)
    if state in ("running", "finalizing"):
        house.lifecycle.start_running(job_id)
    if state == "finalizing":
        house.lifecycle.finalize(job_id)
    job = house.ledger.get(job_id, owner=None)
    assert job.state == state
    with pytest.raises(IllegalTransitionError, match=state):
        house.ledger.delete(job_id, owner=None)
    with pytest.raises(FileInUseError, match=job_id):
        house.ledger.delete_file(job.file_id, owner=None)
    age(house, days=100)
    before = left(house)
    house.reconcile(DAY)
    assert left(house) == before


def test_the_key_of_a_deleted_job_starts_a_new_one_once_it_is_gone(house):
    request = JobRequest(file_id=house.upload(b"{}"))
    job = house.ledger.submit(request, owner=None, idempotency_key="k")
    house.ledger.cancel(job.id, owner=None)
    house.ledger.delete(job.id, owner=None)
    with pytest.raises(IdempotencyConflictError):
        house.ledger.submit(request, owner=None, idempotency_key="k")
    house.reconcile()
    again = house.ledger.submit(request, owner=None, idempotency_key="k")
    assert (again.id, again.state) == (job.id, "validating")


def test_what_a_deleted_job_left_is_removed_after_its_last_task(house):
    job_id = house.submit(house.rows(3))
    house.plan(job_id)
    house.lifecycle.fail(job_id, "for the test")
    house.ledger.delete(job_id, owner=None)
    started = house.queue.rq.started_job_registry.key
    entry = f"{Task(job_id, 'shard', 0).id}:x"
    house.redis.zadd(started, {entry: 2**40})
    house.redis.hset(f"rq:execution:{entry}", "id", "x")  # Its worker's heartbeat.
    house.reconcile()
    assert house.store.list("jobs") == [f"jobs/{job_id}"]
    house.redis.delete(started)
    house.reconcile()
    assert house.store.list("jobs") == []
    assert house.queue.rq.job_ids == []


def test_what_is_older_than_the_retention_goes_and_nothing_else(house, done):
    unused = house.upload(b"{}")
    age(house, days=2)
    young = house.upload(b"{}")
    later = house.submit(house.rows(2))
    carry_out(house, later)
    house.reconcile(DAY)
    house.reconcile()
    assert house.ledger.get(later, owner=None).state == "completed"
    assert house.results(later) == house.expected(house.rows(2))
    kept = {young, house.ledger.get(later, owner=None).file_id}
    assert {file.id for file in house.files.all()} == kept
    assert unused not in kept
    with pytest.raises(UnknownJobError):
        house.ledger.get(done, owner=None)
    assert house.store.list("jobs") == [f"jobs/{later}"]


def test_a_file_is_kept_with_the_last_job_that_used_it(house, done):
    file_id = house.ledger.get(done, owner=None).file_id
    age(house, days=2)
    again = house.ledger.submit(JobRequest(file_id=file_id), owner=None, idempotency_key=None)
    carry_out(house, again.id)
    house.reconcile(DAY)
    assert house.files.get(file_id, owner=None)
    age(house, days=2)
    house.reconcile(DAY)
    with pytest.raises(UnknownFileError):
        house.files.get(file_id, owner=None)
    assert left(house) == []


def test_without_a_retention_everything_stays(house, done):
    age(house, days=10_000)
    before = left(house)
    house.reconcile()
    assert left(house) == before


@pytest.mark.slow
def test_a_job_whose_file_is_gone_fails_and_says_so(house):
    file_id = house.upload(b"{}")
    request = JobRequest(file_id=file_id)
    job_id = house.ledger.submit(request, owner=None, idempotency_key=None).id
    house.files.delete(file_id)
    assert house.start_worker("--burst").wait() == 0
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.error) == ("failed", f"there is no file '{file_id}'")


@pytest.mark.slow
def test_each_of_several_files_is_kept_while_their_job_needs_it(house):
    files = [house.upload(b"{}") for _ in range(2)]
    request = JobRequest(file_ids=files)
    job_id = house.ledger.submit(request, owner=None, idempotency_key=None).id
    for file_id in files:
        with pytest.raises(FileInUseError, match=job_id):
            house.ledger.delete_file(file_id, owner=None)
    age(house, 31)
    house.reconcile(30 * DAY)
    assert {file.id for file in house.files.all()} == set(files)
    house.lifecycle.fail(job_id, "a reason")
    for file_id in files:
        house.ledger.delete_file(file_id, owner=None)
