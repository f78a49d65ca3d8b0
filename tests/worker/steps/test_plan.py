"""The files of a job are planned one after the other, while the first shards are annotated."""

import gzip
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwpo.errors import DatasetError
from cwpo.types import JobRequest
from cwpo_worker.errors import JobStoppedError, WaitingRowsError
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.jobs.turns import TURNS
from cwpo_worker.queue.task_queue import Task
from cwpo_worker.storage.inputs import InputPrefix

BAD = {"prompt": "alone"}


@pytest.fixture
def shop(house, monkeypatch):
    """The house, with shards of two rows."""
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 2)
    return house


class Shelf:
    """A folder of files of rows, which jobs read where they lie."""

    def __init__(self, house, root):
        self._house = house
        self._root = root
        self.folder = root / "shelf"
        self.folder.mkdir()

    def put(self, name, rows):
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def submit(self, **options):
        house = self._house
        prefix = InputPrefix(str(self._root))
        ledger = Ledger(house.redis, house.store, house.lifecycle, house.files, prefix)
        asked = JobRequest(prefix="shelf", **options)
        return ledger.submit(asked, owner=None, idempotency_key=None).id


@pytest.fixture
def shelf(shop, tmp_path):
    """Three files of four rows, a.jsonl, b.jsonl and c.jsonl: row 6 is invalid, the others good."""
    shelf = Shelf(shop, tmp_path)
    rows = shop.rows(12)
    for name, start in (("a", 0), ("b", 4), ("c", 8)):
        some = rows[start : start + 4]
        shelf.put(f"{name}.jsonl", [BAD if row["id"] == "row-5" else row for row in some])
    return shelf


def good_rows(house):
    return [row for row in house.rows(12) if row["id"] != "row-5"]


def shown(house, job_id):
    job = house.ledger.get(job_id, owner=None)
    return job.state, job.progress.rows_total, job.progress.rows_done


def waiting(house):
    return sorted(str(task) for task in house.queue.census().waiting)


def blobs(house, folder):
    """What is in a folder of the store, by name."""
    return {key.rsplit("/", 1)[-1]: house.store.read(key) for key in house.store.list(folder)}


def planned(house, job_id):
    """The shards of a job, and the rows that were rejected when it was planned."""
    folder = JobFolder(job_id)
    return blobs(house, folder.shards), house.store.read(folder.rejected)


def test_shards_are_annotated_before_the_last_file_is_planned(shop):
    rows = shop.rows(6)
    job_id = shop.submit_files(rows[:2], rows[2:4], rows[4:])
    shop.plan(job_id)
    assert shown(shop, job_id) == ("queued", None, 0)
    shop.annotate(job_id, 0)
    assert shown(shop, job_id) == ("running", None, 2)
    shop.plan(job_id, 1)
    shop.annotate(job_id, 1)
    assert shown(shop, job_id) == ("running", None, 4)
    shop.plan(job_id, 2)
    assert shown(shop, job_id) == ("running", 6, 4)
    shop.annotate(job_id, 2)
    shop.merge(job_id)
    assert shown(shop, job_id) == ("completed", 6, 6)
    assert shop.results(job_id) == shop.expected(rows)


def test_shards_are_annotated_before_their_file_is_planned_to_its_end(shop):
    rows = shop.rows(40)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cut_off = gzip.compress(lines.encode())[:-8]
    job_id = shop.submit(cut_off, "jsonl.gz")
    with pytest.raises(DatasetError, match="ends too early, after line 40"):
        shop.plan(job_id)
    assert shown(shop, job_id) == ("queued", None, 0)
    assert shop.lifecycle.turns.shards_of(job_id) == 16
    for index in range(16):
        shop.annotate(job_id, index)
    # All that were handed over are finished, and the job goes on, for its plan does.
    assert shown(shop, job_id) == ("running", None, 32)
    shop.queue.rq.empty()
    shop.reconcile()
    assert "plan" in waiting(shop)


@pytest.mark.slow
def test_a_job_that_is_cancelled_in_the_midst_of_a_plan_publishes_what_is_finished(shop):
    rows = [BAD if number % 10 == 3 else row for number, row in enumerate(shop.rows(8000))]
    job_id, one = (shop.submit(rows, max_rejected_share=0.5) for _ in range(2))
    shop.plan(one)
    with ThreadPoolExecutor(1) as pool:
        plan = pool.submit(shop.plan, job_id)
        while shop.lifecycle.turns.shards_of(job_id) is None:
            time.sleep(0.001)
        for index in (0, 7):
            shop.annotate(job_id, index)
        # Ended only when none of its tasks is running, and the thread is no task.
        shop.ledger.cancel(job_id, owner=None)
        with pytest.raises(JobStoppedError, match="is cancelling"):
            plan.result()
    midst = JobFolder(job_id).read_manifest(shop.store)
    assert midst.checkpoint == midst.shard_count < 3600
    shop.merge(job_id)
    first_bad = [row for row in range(1, midst.rows + 1) if row % 10 == 4]
    assert shown(shop, job_id) == ("cancelled", None, 4 + len(first_bad))
    assert [error["row"] for error in shop.errors(job_id)] == first_bad
    good = [row for row in rows if row is not BAD]
    assert shop.results(job_id) == shop.expected(good[:2] + good[14:16])
    shop.ledger.resume(job_id, owner=None)
    shop.plan(job_id)
    assert planned(shop, job_id) == planned(shop, one)


def test_a_job_whose_shards_are_finished_waits_for_its_last_plan(shop):
    rows = shop.rows(2)
    job_id = shop.submit_files(rows, [BAD])
    shop.plan(job_id)
    shop.annotate(job_id, 0)
    shop.reconcile()
    assert shown(shop, job_id) == ("running", None, 2)
    shop.plan(job_id, 1)
    assert shown(shop, job_id) == ("finalizing", 3, 3)
    shop.merge(job_id)
    assert shop.results(job_id) == shop.expected(rows)
    assert [error["row"] for error in shop.errors(job_id)] == [3]


@pytest.mark.slow
def test_workers_plan_file_after_file(shelf, shop):
    job_id = shelf.submit()
    shop.work()
    assert shown(shop, job_id) == ("completed_with_errors", 12, 12)
    assert shop.results(job_id) == shop.expected(good_rows(shop))
    assert [error["row"] for error in shop.errors(job_id)] == [6]


@pytest.mark.slow
@settings(
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=7))
def test_however_rows_are_spread_over_files_the_shards_are_those_of_one_file(shop, spread):
    rows = iter(shop.rows(49))
    files = [[next(rows) if good else BAD for good in file] for file in spread]
    together = [row for file in files for row in file]
    if not together:
        return
    several, one = shop.submit_files(*files), shop.submit(together)
    for number in range(len(files)):
        with suppress(JobStoppedError):  # It was planned with the files before it.
            shop.plan(several, number)
    shop.plan(one)
    assert planned(shop, several) == planned(shop, one)
    manifests = [JobFolder(job_id).read_manifest(shop.store) for job_id in (several, one)]
    ours = {"job_id", "input_sha256"}
    assert manifests[0].model_dump(exclude=ours) == manifests[1].model_dump(exclude=ours)


def test_small_files_are_planned_together(house):
    rows = house.rows(30)
    job_id = house.submit_files(*([row] for row in rows))
    house.queue.rq.empty()
    house.plan(job_id)
    assert shown(house, job_id) == ("queued", 30, 0)
    assert waiting(house) == ["shard 0"]


def test_two_plans_of_a_file_at_once_are_one(shop):
    rows = shop.rows(400)
    job_id = shop.submit_files(rows[:300], rows[300:])
    shop.queue.rq.empty()
    with ThreadPoolExecutor(2) as pool:
        twins = [pool.submit(shop.plan, job_id) for _ in range(2)]
    for twin in twins:
        with suppress(JobStoppedError):  # It may have come when the other had finished.
            twin.result()
    queued = [Task.parse(task_id) for task_id in shop.queue.rq.get_job_ids()]
    assert queued.count(Task(job_id, "plan", 1)) == 1
    assert JobFolder(job_id).read_manifest(shop.store).shard_count == 150


@pytest.mark.slow
def test_a_plan_that_is_killed_goes_on_with_its_file(shop, tmp_path):
    shelf = Shelf(shop, tmp_path)
    rows = shop.rows(6004)
    shelf.put("a.jsonl", rows[:4])
    shelf.put("b.jsonl", rows[4:])
    job_id = shelf.submit(merge="never")
    worker = shop.start_worker("--heartbeat-seconds", "3")
    deadline = time.monotonic() + 60
    while not shop.store.exists(JobFolder(job_id).shard(50)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    # The worker and the child at work are in one session, but in groups of their own.
    for pid in children(worker.pid):
        os.kill(pid, signal.SIGKILL)
    worker.kill()
    worker.wait()
    record = shop.registry.get(job_id)
    assert (record.is_planned, record.files_planned) == (False, 1)
    shop.lifecycle.fail(job_id, "its worker was killed")
    shop.ledger.resume(job_id, owner=None)
    (shelf.folder / "a.jsonl").unlink()  # It would be missed if it was read again.
    shop.plan(job_id)
    shop.plan(job_id, 1)
    manifest = JobFolder(job_id).read_manifest(shop.store)
    assert (manifest.is_whole, manifest.rows, manifest.shard_count) == (True, 6004, 3002)


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_a_plan_that_is_lost_between_two_files_goes_on_with_the_second(shelf, shop):
    job_id = shelf.submit()
    shop.plan(job_id)
    shop.queue.rq.empty()
    (shelf.folder / "a.jsonl").unlink()
    shop.reconcile()
    assert "plan 1" in waiting(shop)
    shop.work()
    assert shop.results(job_id) == shop.expected(good_rows(shop))


def test_a_plan_that_died_before_it_was_noted_is_not_made_again(shelf, shop):
    job_id = shelf.submit()
    before = shop.registry.get(job_id)
    shop.plan(job_id)
    shop.redis.set(f"cwpo:job:{job_id}", before.model_dump_json())
    shop.redis.delete(TURNS)
    shop.queue.rq.empty()
    (shelf.folder / "a.jsonl").unlink()
    shop.plan(job_id)
    assert waiting(shop) == ["plan 1", "shard 0", "shard 1"]


def test_shards_that_a_plan_had_no_time_to_hand_over_are_annotated(shelf, shop):
    job_id = shelf.submit()
    shop.plan(job_id)
    turn = shop.redis.hget(TURNS, job_id)
    shop.plan(job_id, 1)
    shop.plan(job_id, 2)
    shop.redis.hset(TURNS, job_id, turn)
    shop.reconcile()
    shop.work()
    assert shop.results(job_id) == shop.expected(good_rows(shop))


def test_redis_forgetting_everything_between_two_plans_loses_nothing(shelf, shop):
    job_id = shelf.submit()
    shop.plan(job_id)
    shop.annotate(job_id, 0)
    asked = shop.service.requests
    (shelf.folder / "a.jsonl").unlink()
    shop.redis.flushall()
    shop.reconcile()
    assert waiting(shop) == ["plan 1", "shard 0", "shard 1"]
    shop.work()
    assert shown(shop, job_id) == ("completed_with_errors", 12, 12)
    assert shop.results(job_id) == shop.expected(good_rows(shop))
    assert shop.service.requests == asked + 5


@pytest.mark.slow
def test_a_later_file_that_cannot_be_read_fails_the_job_by_name(shelf, shop):
    job_id = shelf.submit()
    away = shelf.folder.parent / "b.jsonl"
    (shelf.folder / "b.jsonl").rename(away)
    shop.work()
    job = shop.ledger.get(job_id, owner=None)
    assert (job.state, job.error) == ("failed", "there is no input 'b.jsonl'")
    assert waiting(shop) == []
    away.rename(shelf.folder / "b.jsonl")
    (shelf.folder / "a.jsonl").unlink()
    asked = shop.service.requests + 6 - len(shop.store.list(JobFolder(job_id).parts))
    shop.ledger.resume(job_id, owner=None)
    shop.work()
    assert shop.results(job_id) == shop.expected(good_rows(shop))
    assert shop.service.requests == asked


def test_the_share_of_bad_rows_is_that_of_all_files_so_far(shop):
    good, bad = shop.rows(990), [BAD] * 30
    job_id = shop.submit_files(good, bad, max_rejected_share=0.02)
    shop.plan(job_id)
    expected = (
        r"21 of the first 1,011 rows, up to file-\w+, are invalid.*row 991: chosen is missing"
    )
    with pytest.raises(DatasetError, match=expected):
        shop.plan(job_id, 1)


@pytest.mark.slow
def test_a_job_that_is_cancelled_between_two_plans_publishes_what_is_finished(shelf, shop):
    job_id = shelf.submit()
    shop.plan(job_id)
    shop.plan(job_id, 1)
    shop.annotate(job_id, 1)
    shop.ledger.cancel(job_id, owner=None)
    assert waiting(shop) == ["merge"]
    with pytest.raises(JobStoppedError, match="is cancelling"):
        shop.plan(job_id, 2)
    shop.merge(job_id)
    assert shown(shop, job_id) == ("cancelled", None, 3)
    assert shop.results(job_id) == shop.expected(shop.rows(4)[2:])
    assert [error["row"] for error in shop.errors(job_id)] == [6]
    shop.ledger.resume(job_id, owner=None)
    (shelf.folder / "b.jsonl").unlink()
    shop.work()
    assert shown(shop, job_id) == ("completed_with_errors", 12, 12)
    assert shop.results(job_id) == shop.expected(good_rows(shop))
    assert [error["row"] for error in shop.errors(job_id)] == [6]


def test_a_job_that_is_pinned_anew_between_two_plans_keeps_its_shards(shelf, shop):
    job_id = shelf.submit()
    shop.plan(job_id)
    shop.annotate(job_id, 0)
    shop.lifecycle.fail(job_id, "its annotator is gone")
    shop.queue.rq.empty()
    shop.ledger.resume(job_id, owner=None, repin=True)
    (shelf.folder / "a.jsonl").unlink()
    shop.work()
    assert shop.results(job_id) == shop.expected(good_rows(shop))


def test_the_rows_that_are_planned_count_as_waiting(shop):
    limits = {"max_waiting_rows": 2}
    ledger = Ledger(shop.redis, shop.store, shop.lifecycle, shop.files, **limits)
    rows = shop.rows(4)
    job_id = shop.submit_files(rows[:2], rows[2:], owner="ann")
    (file_id, _) = shop.registry.get(job_id).files
    asked = JobRequest(file_id=file_id)
    shop.plan(job_id)
    with pytest.raises(WaitingRowsError, match="2 rows of jobs of the API key ann are waiting"):
        ledger.submit(asked, owner="ann", idempotency_key=None)
    shop.annotate(job_id, 0)
    ledger.submit(asked, owner="ann", idempotency_key=None)


COLUMNS = [
    [{"n": 1, "kept": True}, {"n": 2, "kept": None}],
    [{"n": 3, "late": "x"}, {"n": 0.5}],
    [{"n": "many", "late": [1]}, {}],
]


@pytest.mark.parametrize("merge", ["auto", "never"])
def test_columns_that_change_from_file_to_file_are_those_of_one_file(shop, merge):
    rows = shop.rows(6)
    rows[2]["prompt"] = "long " * 5000  # The service refuses it.
    shop.service.max_body_bytes = 20_000
    rows = iter(rows)
    files = [[next(rows) | extra for extra in file] for file in COLUMNS]
    several = shop.submit_files(*files, merge=merge)
    one = shop.submit([row for file in files for row in file], merge=merge)
    for number in range(3):
        shop.plan(several, number)
        shop.annotate(several, number)
    shop.plan(one)
    for index in range(3):
        shop.annotate(one, index)
    datasets = []
    for job_id in (several, one):
        shop.merge(job_id)
        listed = shop.ledger.parts(job_id, owner=None)
        datasets.append([listed.columns, *(part_of(shop, job_id, part) for part in listed.parts)])
    assert datasets[0] == datasets[1]
    if merge == "auto":
        assert read_results(shop, several) == read_results(shop, one)
    assert shop.errors(several) == shop.errors(one) != []


def part_of(house, job_id, part):
    """The content of a part, which is what the list says."""
    with house.ledger.open_part(job_id, part.name, owner=None).stream as stream:
        content = stream.read()
    assert (len(content), sha256(content).hexdigest()) == (part.bytes, part.sha256)
    return content


def read_results(house, job_id):
    stream, *_ = house.ledger.open_results(job_id, "jsonl", owner=None)
    with stream:
        return stream.read()


def test_parts_that_have_all_columns_are_the_dataset_as_they_are(shop):
    rows = [row | {"n": number} for number, row in enumerate(shop.rows(4))]
    job_id = shop.submit_files(rows[:2], rows[2:])
    for number in range(2):
        shop.plan(job_id, number)
        shop.annotate(job_id, number)
    shop.merge(job_id)
    folder = JobFolder(job_id)
    stored = blobs(shop, folder.parts).values()
    assert [len(part) for part in stored] == [
        part.bytes for part in shop.ledger.parts(job_id, owner=None).parts
    ]
    assert not shop.store.exists(folder.completed_part(0))
