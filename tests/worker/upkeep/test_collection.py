"""Blobs that belong to no record are removed once they are old."""

import os
import time

import pytest

from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.upkeep import collection
from cwpo_worker.upkeep.collection import LOOKED

OLD = 25 * 3600


@pytest.fixture
def collect(house):
    """`collect()`: a round of upkeep, as if none had been for a while."""

    def run():
        house.redis.delete(LOOKED)
        house.reconcile()

    return run


def blobs(house):
    """All blobs of files and jobs, by key."""
    folder = house.store_folder
    places = [folder / "files", folder / "jobs"]
    paths = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)) for path in paths}


def age(house, *keys, seconds=OLD):
    """Make all blobs, or those with these keys, so much older."""
    then = time.time() - seconds
    for key in keys or blobs(house):
        os.utime(house.store_folder / key, (then, then))


def test_what_belongs_to_records_stays_however_old(house, collect):
    job_id = house.submit(house.rows(3))
    house.plan(job_id)
    house.annotate(job_id, 0)
    house.merge(job_id)
    house.submit(house.rows(2))
    before = blobs(house)
    age(house)
    collect()
    assert blobs(house) == before


def test_the_data_of_an_upload_that_crashed_goes_after_a_day(house, collect):
    file_id = house.upload(b"{}")
    house.store.delete(f"files/{file_id}/file.json")
    (left,) = blobs(house)
    age(house, seconds=OLD - 2 * 3600)
    collect()
    assert blobs(house) == {left}
    age(house)
    collect()
    assert blobs(house) == set()


def test_data_that_another_upload_sent_under_one_key_goes(house, collect):
    upload = house.files.receive("jsonl", owner=None, idempotency_key="k")
    upload.write(b"{}")
    file_id = upload.commit().id
    kept = blobs(house)
    house.store.put(f"files/{file_id}/{'0' * 64}", b"other bytes")
    age(house)
    collect()
    assert blobs(house) == kept


def test_what_a_straggler_writes_to_a_deleted_job_goes(house, collect):
    key = JobFolder("job-" + "0" * 24).part(3)
    house.store.put(key, b"a part")
    collect()
    assert blobs(house) == {key}
    age(house)
    collect()
    assert blobs(house) == set()


def test_a_folder_with_one_young_blob_stays(house, collect):
    folder = JobFolder("job-" + "0" * 24)
    for index in (1, 2):
        house.store.put(folder.part(index), b"a part")
    age(house, folder.part(1))
    collect()
    assert blobs(house) == {folder.part(1), folder.part(2)}


def test_a_round_looks_at_a_few_folders_and_the_next_goes_on(house, collect, monkeypatch):
    monkeypatch.setattr(collection, "SLICE_FOLDERS", 2)
    keys = {JobFolder(f"job-{index:024x}").part(0) for index in range(5)}
    for key in keys:
        house.store.put(key, b"a part")
    age(house)
    left = []
    for _ in range(3):
        collect()
        left.append(len(blobs(house)))
    assert left == [3, 1, 0]
    house.store.put(min(keys), b"a part")
    age(house)
    house.reconcile()
    assert blobs(house) == {min(keys)}  # It was looked at just now.
    collect()
    assert blobs(house) == set()


@pytest.mark.slow
def test_object_stores_tell_when_a_blob_was_written(s3, tmp_path):
    for url in (f"{s3}/prefix", f"memory://{tmp_path.name}", str(tmp_path)):
        store = BlobStore(url)
        store.put("jobs/j/parts/0", b"")
        ((key, written),) = store.written("jobs").items()
        assert key == "jobs/j/parts/0"
        assert abs(written - time.time()) < 3600
