import json
import threading
from datetime import UTC, datetime, timedelta

import pytest

from cwpo.types import JobRequest, ModelRef
from cwpo_worker.errors import (
    IdempotencyConflictError,
    IllegalTransitionError,
    InvalidCursorError,
    JobStoppedError,
    QueueUnavailableError,
    UnknownFileError,
    UnknownJobError,
)
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.steps.plan import plan_file
from cwpo_worker.storage.store import BlobStore


def submit(house, file_id, *, owner=None, key=None, truncation="error"):
    request = JobRequest(file_id=file_id, truncation=truncation)
    return house.ledger.submit(request, owner=owner, idempotency_key=key)


def test_what_a_newer_version_wrote_is_kept_by_this_one(house):
    job_id = house.submit(house.rows(3))
    key = f"cwpo:job:{job_id}"
    newer = json.loads(house.redis.get(key)) | {"lease": {"until": 7}}
    newer["progress"]["rows_skipped"] = 0
    house.redis.set(key, json.dumps(newer))
    house.plan(job_id)
    manifest = JobFolder(job_id).manifest
    planned = json.loads(house.store.read(manifest)) | {"order": "by prompt"}
    house.store.delete(manifest)
    house.store.put(manifest, json.dumps(planned).encode())
    house.annotate(job_id, 0)
    house.merge(job_id)
    assert house.ledger.get(job_id, owner=None).state == "completed"
    assert json.loads(house.redis.get(key))["lease"] == {"until": 7}


def test_a_retried_submission_is_one_job(house):
    file_id = house.upload(b"{}\n")
    first = submit(house, file_id, key="k")
    assert submit(house, file_id, key="k") == first
    assert submit(house, file_id).id != first.id
    assert len(house.queue.rq) == 2
    with pytest.raises(IdempotencyConflictError):
        submit(house, file_id, key="k", truncation="prompt_left")
    request = JobRequest(file_id=file_id, max_rejected_share=0.1)
    with pytest.raises(IdempotencyConflictError):
        house.ledger.submit(request, owner=None, idempotency_key="k")


def test_submissions_with_one_key_at_one_moment_are_one_job(house):
    file_id = house.upload(b"{}\n")
    jobs = []
    threads = [
        threading.Thread(target=lambda: jobs.append(submit(house, file_id, key="k")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 8
    assert all(job == jobs[0] for job in jobs)
    assert len(house.queue.rq) == 1


def test_a_retried_submission_does_not_set_the_job_back(house):
    file_id = house.upload(b"{}\n")
    job = submit(house, file_id, key="k")
    house.plan(job.id)
    house.redis.flushall()
    again = submit(house, file_id, key="k")
    assert again.id == job.id
    assert again.state == "finalizing"


def test_owners_see_their_own_jobs_and_an_admin_all(house):
    of_ann = submit(house, house.upload(b"{}\n", owner="ann"), owner="ann")
    of_bob = submit(house, house.upload(b"{}\n", owner="bob"), owner="bob")
    assert house.ledger.get(of_ann.id, owner="ann") == of_ann
    assert house.ledger.get(of_ann.id, owner=None) == of_ann
    for call in (house.ledger.get, house.ledger.cancel, house.ledger.open_errors):
        with pytest.raises(UnknownJobError):
            call(of_ann.id, owner="bob")
    assert page(house, owner="bob")[0] == [of_bob.id]
    assert page(house)[0] == [of_bob.id, of_ann.id]
    with pytest.raises(UnknownFileError):
        submit(house, of_ann.file_id, owner="bob")


def page(house, *, owner=None, state=None, limit=50, cursor=None):
    jobs = house.ledger.list(owner=owner, state=state, limit=limit, cursor=cursor)
    return [job.id for job in jobs.jobs], jobs.next_cursor


def test_a_list_is_bounded_by_the_times_of_creation(house):
    file_id = house.upload(b"{}\n")
    oldest, middle, newest = (submit(house, file_id) for _ in range(3))

    def created(after=None, before=None, cursor=None):
        bounds = {"created_after": after, "created_before": before}
        jobs = house.ledger.list(owner=None, limit=1, cursor=cursor, **bounds)
        ids = [job.id for job in jobs.jobs]
        rest = created(after, before, jobs.next_cursor) if jobs.next_cursor else []
        return ids + rest

    assert created(after=middle.created_at) == [newest.id, middle.id]
    assert created(before=middle.created_at) == [oldest.id]
    assert created(middle.created_at, newest.created_at) == [middle.id]
    assert created(after=newest.created_at + timedelta(days=1)) == []
    assert created(before=datetime(1900, 1, 1, tzinfo=UTC)) == []
    assert created(after=datetime(1900, 1, 1, tzinfo=UTC)) == [newest.id, middle.id, oldest.id]


def test_pages_go_from_the_newest_to_the_oldest_and_overlap_nowhere(house):
    file_id = house.upload(b"{}\n")
    newest_first = [submit(house, file_id).id for _ in range(7)][::-1]
    house.ledger.cancel(newest_first[1], owner=None)
    seen, cursor = page(house, limit=3)
    while cursor is not None:
        more, cursor = page(house, limit=3, cursor=cursor)
        assert 0 < len(more) <= 3
        seen += more
    assert seen == newest_first
    assert page(house, state="cancelled") == ([newest_first[1]], None)
    assert page(house, limit=7) == (newest_first, None)
    with pytest.raises(InvalidCursorError):
        page(house, cursor="+inf")


@pytest.mark.parametrize("job_id", ["", "job-1", f"job-{'0' * 24}", "../x", "file-" + "0" * 24])
def test_an_id_that_is_none_is_unknown(house, job_id):
    with pytest.raises(UnknownJobError):
        house.ledger.get(job_id, owner=None)


def test_results_are_not_to_be_had_before_the_job_has_completed(house):
    job_id = house.submit(house.rows(1))
    with pytest.raises(IllegalTransitionError, match="is validating: it has no results yet"):
        house.ledger.open_results(job_id, "jsonl", owner=None)
    house.ledger.cancel(job_id, owner=None)
    with pytest.raises(IllegalTransitionError, match="is cancelled: it has no results"):
        house.ledger.open_errors(job_id, owner=None)


def test_cancelling_a_waiting_job_ends_it_and_empties_the_queue(house):
    kept = house.submit(house.rows(1))
    job_id = house.submit(house.rows(5000))
    house.plan(job_id)
    assert house.ledger.cancel(job_id, owner=None).state == "cancelled"
    assert house.ledger.cancel(job_id, owner=None).state == "cancelled"
    # Only the other job's plan is left.
    assert [task.job_id for task in house.queue.census().waiting] == [kept]


def test_a_plan_stops_when_its_job_is_cancelled(house):
    job_id = house.submit(house.rows(6_000))
    folder = JobFolder(job_id)

    class Meanwhile(BlobStore):
        """A store at whose second shard the job is cancelled."""

        def create(self, key):
            if key == folder.shard(1):
                house.ledger.cancel(job_id, owner=None)
            return super().create(key)

    with pytest.raises(JobStoppedError, match="is cancel"):
        plan_file(house.lifecycle, Meanwhile(house.store_url), job_id)
    assert house.store.exists(folder.shard(1))
    assert not house.store.exists(folder.shard(2))
    assert not house.store.exists(folder.manifest)


@pytest.mark.slow
def test_cancelling_a_running_job_stops_it_between_requests_and_keeps_what_is_done(house):
    job_id = house.submit(house.rows(6000))
    house.plan(job_id)
    house.annotate(job_id, 0)
    house.service.gate.clear()
    before = house.service.requests
    house.start_worker()
    house.wait_for(job_id, lambda _: house.service.requests > before)
    assert house.ledger.cancel(job_id, owner=None).state == "cancelling"
    house.service.gate.set()
    job = house.wait(job_id)
    assert job.state == "cancelled"
    assert job.progress.rows_annotated == 2048
    assert house.results(job_id) == house.expected(house.rows(2048))
    assert house.service.requests <= before + 5
    assert house.store.list(f"jobs/{job_id}/parts") == [f"jobs/{job_id}/parts/00000.parquet"]


@pytest.mark.slow
def test_a_job_that_has_ended_is_not_cancelled(house):
    job_id = house.submit(b"no json\n")
    house.start_worker("--burst").wait()
    with pytest.raises(IllegalTransitionError, match="is completed_with_errors"):
        house.ledger.cancel(job_id, owner=None)


def test_progress_counts_each_finished_shard_once(house):
    job_id = house.submit([*house.rows(3000), {"prompt": "alone"}])
    house.plan(job_id)
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.progress.rows_total, job.progress.rows_done) == ("queued", 3001, 1)
    for _ in range(2):
        house.annotate(job_id, 1)
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.progress.rows_done, job.progress.rows_failed) == ("running", 953, 1)
    assert job.progress.rows_per_second > 0
    assert job.progress.eta_seconds > 0


def test_a_dead_queue_is_one_clear_line(house):
    file_id = house.upload(b"{}\n")
    job_id = submit(house, file_id).id
    house.reconcile()
    house.ledger.check()
    house.valkey.stop()
    for call in (
        house.ledger.check,
        lambda: submit(house, file_id),
        lambda: house.ledger.get(job_id, owner=None),
        lambda: house.ledger.cancel(job_id, owner=None),
        lambda: page(house),
    ):
        with pytest.raises(QueueUnavailableError, match="the job queue cannot be used") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_submission_that_the_queue_missed_is_made_good_by_its_retry(house):
    file_id = house.upload(b"{}\n")
    house.valkey.stop()
    with pytest.raises(QueueUnavailableError):
        submit(house, file_id, key="k")
    house.valkey.start()
    job = submit(house, file_id, key="k")
    house.reconcile()
    assert [task.job_id for task in house.queue.census().waiting] == [job.id]


@pytest.mark.slow
def test_a_failed_job_is_resumed_and_keeps_its_annotator(house):
    job_id = house.submit(house.rows(5000))
    house.plan(job_id)
    house.annotate(job_id, 0)
    house.lifecycle.fail(job_id, "somebody stumbled over a cable")
    with pytest.raises(UnknownJobError):
        house.ledger.resume("job-" + "0" * 24, owner=None)
    house.redis.flushall()
    house.reconcile()
    assert house.ledger.resume(job_id, owner=None).error is None
    house.service.model = ModelRef(name="null", revision="other")
    house.start_worker("--burst", "--model-wait", "0")
    job = house.wait(job_id)
    assert job.state == "failed"
    assert "no replica of the service has hosted the job's annotator null null" in job.error
    house.service.reset()
    house.ledger.resume(job_id, owner=None)
    house.start_worker("--burst")
    job = house.wait(job_id)
    assert job.state == "completed"
    assert house.results(job_id) == house.expected(house.rows(5000))
