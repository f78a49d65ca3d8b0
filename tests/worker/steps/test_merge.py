import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from typing import ClassVar

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from cwpo.types import FailedAnnotation, ItemError
from cwpo_worker.errors import (
    DatasetFormError,
    IncompleteJobError,
    InvalidCursorError,
    JobStoppedError,
    UnknownPartError,
)
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.queue.task_queue import Task
from cwpo_worker.steps.merge import discard_shards
from cwpo_worker.steps.part import write_part
from cwpo_worker.steps.shard_rows import numbered_triplets, read_shard
from harness import labels_of


class WatchedFileSystem(LocalFileSystem):
    """Local files, `watched://PATH`, the list of those that were opened, and who is told of it."""

    protocol = "watched"
    opened: ClassVar[list[str]] = []
    watcher: ClassVar[list[Callable[[str], None]]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("watched://"))

    def _open(self, path, *arguments, **options):
        self.opened.append(path)
        for tell in self.watcher:
            tell(path)
        return super()._open(path, *arguments, **options)


@pytest.fixture
def watched_house(make_house, tmp_path):
    """A house with a store on a WatchedFileSystem."""
    fsspec.register_implementation("watched", WatchedFileSystem, clobber=True)
    yield make_house(f"watched://{tmp_path}/watched")
    WatchedFileSystem.opened.clear()
    WatchedFileSystem.watcher.clear()


@pytest.fixture
def annotated(house):
    """A job of two shards that is ready to be merged."""
    job_id = house.submit([*house.rows(2100), {"prompt": "alone"}])
    house.plan(job_id)
    for index in (1, 0):
        house.annotate(job_id, index)
    return job_id


def test_the_parts_come_in_order_whatever_the_order_they_were_made_in(house, annotated):
    house.merge(annotated)
    assert house.results(annotated) == house.expected(house.rows(2100))
    assert [error["row"] for error in house.errors(annotated)] == [2101]


def test_a_second_merge_after_a_crash_finds_everything_there(house, annotated):
    store, folder = house.store, JobFolder(annotated)
    record = house.registry.get(annotated)
    house.merge(annotated)
    before = [store.read(folder.results(format)) for format in ("parquet", "jsonl")]
    with pytest.raises(JobStoppedError):
        house.merge(annotated)
    # As if the first had died after it published: the record still says finalizing.
    house.redis.set(f"cwpo:job:{annotated}", record.model_dump_json())
    house.merge(annotated)
    assert [store.read(folder.results(format)) for format in ("parquet", "jsonl")] == before
    assert house.ledger.get(annotated, owner=None).state == "completed_with_errors"


def test_the_checksum_of_a_file_that_another_run_published_is_not_stated(house, annotated):
    with house.store.create(JobFolder(annotated).results("parquet")) as blob:
        blob.write(b"by another version, with other bytes")
    house.merge(annotated)
    open_results = house.ledger.open_results
    with open_results(annotated, "jsonl", owner=None).stream as stream:
        checksum = sha256(stream.read()).hexdigest()
    assert open_results(annotated, "jsonl", owner=None).sha256 == checksum
    assert open_results(annotated, "parquet", owner=None).sha256 is None


def test_two_merges_at_once_give_one_result(house, annotated):
    with ThreadPoolExecutor(2) as pool:
        twins = [pool.submit(house.merge, annotated) for _ in range(2)]
    for twin in twins:
        with suppress(JobStoppedError):  # It may have come when the other had finished.
            twin.result()
    assert house.results(annotated) == house.expected(house.rows(2100))


def test_a_lost_part_is_not_merged_over(house, annotated):
    house.store.delete(JobFolder(annotated).part(1))
    with pytest.raises(IncompleteJobError, match="part 1 is missing"):
        house.merge(annotated)
    assert not house.store.exists(JobFolder(annotated).results("jsonl"))


def test_a_part_of_the_wrong_size_is_not_merged_over(house, annotated):
    store, folder = house.store, JobFolder(annotated)
    store.put(folder.part(0), store.read(folder.part(1)))
    with pytest.raises(IncompleteJobError, match=r"part 1 begins with row 2,049, .* row 2,100"):
        house.merge(annotated)
    assert not store.exists(folder.results("jsonl"))


def parts_of(house, job_id):
    """All parts of the dataset, page by page."""
    pages = [house.ledger.parts(job_id, owner=None)]
    while pages[-1].next_cursor is not None:
        pages.append(house.ledger.parts(job_id, owner=None, cursor=pages[-1].next_cursor))
    return [part for page in pages for part in page.parts]


def rows_of_part(house, job_id, part):
    """The rows of a part, whose file is what the list says."""
    with house.ledger.open_part(job_id, part.name, owner=None).stream as stream:
        content = stream.read()
    assert (len(content), sha256(content).hexdigest()) == (part.bytes, part.sha256)
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    assert len(rows) == part.rows
    return rows


def test_the_parts_are_the_dataset(house, annotated):
    house.merge(annotated)
    parts = parts_of(house, annotated)
    assert [part.name for part in parts] == ["part-00000000.parquet", "part-00000001.parquet"]
    rows = [row for part in parts for row in rows_of_part(house, annotated, part)]
    assert rows == house.results(annotated)
    listed = house.ledger.parts(annotated, owner=None)
    assert (listed.rows, listed.bytes) == (2100, sum(part.bytes for part in parts))
    names = ["id", "prompt", "chosen", "rejected", "confidence"]
    assert [column.name for column in listed.columns][:5] == names
    with pytest.raises(UnknownPartError):
        house.ledger.open_part(annotated, "part-00000002.parquet", owner=None)


def fail_rows(house, job_id, index, count):
    """Finish a shard as if the service had failed on its first rows."""
    folder = JobFolder(job_id)
    rows = read_shard(house.store.read(folder.shard(index)))
    triplets = [row.triplet for row in numbered_triplets(rows)]
    error = ItemError(code="too_long", detail="too long")
    failed = [FailedAnnotation(id=triplet.id, error=error) for triplet in triplets[:count]]
    labels = [*failed, *labels_of(triplets[count:])]
    model = house.service.model if count < len(triplets) else None
    counts = write_part(house.store, folder.part(index), rows, labels, model)
    house.lifecycle.start_running(job_id)
    house.lifecycle.finish_shard(house.registry.get(job_id), index, counts)


def test_a_part_without_an_annotated_row_does_not_belong_to_the_dataset(house):
    rows = house.rows(2050)
    job_id = house.submit(rows)
    house.plan(job_id)
    fail_rows(house, job_id, 0, 2048)
    house.annotate(job_id, 1)
    house.merge(job_id)
    (part,) = parts_of(house, job_id)
    assert rows_of_part(house, job_id, part) == house.expected(rows[2048:])
    assert len(house.errors(job_id)) == 2048
    with pytest.raises(UnknownPartError):
        house.ledger.open_part(job_id, "part-00000000.parquet", owner=None)


def test_a_large_dataset_is_parts_only(house, annotated, monkeypatch):
    monkeypatch.setattr("cwpo_worker.steps.merge.MERGED_ROWS", 2100)
    house.merge(annotated)
    said = f"cwpo jobs download {annotated} -o FOLDER/"
    with pytest.raises(DatasetFormError, match=said):
        house.ledger.open_results(annotated, "parquet", owner=None)
    assert sum(part.rows for part in parts_of(house, annotated)) == 2100
    assert [error["row"] for error in house.errors(annotated)] == [2101]


def test_a_dataset_of_few_long_rows_is_parts_only(house, annotated, monkeypatch):
    size = len(house.store.read(JobFolder(annotated).part(0)))
    monkeypatch.setattr("cwpo_worker.steps.merge.MERGED_BYTES", size)
    house.merge(annotated)
    with pytest.raises(DatasetFormError):
        house.ledger.open_results(annotated, "jsonl", owner=None)
    assert sum(part.rows for part in parts_of(house, annotated)) == 2100
    partial = house.store_folder / ".partial"
    assert list(partial.iterdir()) == []


def test_a_job_may_ask_for_parts_only(house):
    job_id = house.submit(house.rows(3), merge="never")
    assert house.ledger.get(job_id, owner=None).merge == "never"
    house.plan(job_id)
    house.annotate(job_id, 0)
    house.merge(job_id)
    with pytest.raises(DatasetFormError):
        house.ledger.open_results(job_id, "jsonl", owner=None)
    (part,) = parts_of(house, job_id)
    assert rows_of_part(house, job_id, part) == house.expected(house.rows(3))


def test_a_long_list_of_parts_comes_in_pages(house, monkeypatch):
    for module in ("steps.merge", "jobs.dataset"):
        monkeypatch.setattr(f"cwpo_worker.{module}.PAGE_PARTS", 2)
    rows = house.rows(5000)
    job_id = house.submit(rows)
    house.plan(job_id)
    for index in range(3):
        house.annotate(job_id, index)
    house.merge(job_id)
    first = house.ledger.parts(job_id, owner=None)
    assert (len(first.parts), first.next_cursor, first.rows) == (2, "1", 5000)
    parts = parts_of(house, job_id)
    assert [row for part in parts for row in rows_of_part(house, job_id, part)] == house.expected(
        rows
    )
    for cursor in ("0", "2", "-1", "x", "9" * 30):
        with pytest.raises(InvalidCursorError):
            house.ledger.parts(job_id, owner=None, cursor=cursor)


def test_an_interrupted_merge_goes_on_where_it_was(watched_house, monkeypatch):
    house = watched_house
    for module in ("steps.merge", "jobs.dataset"):
        monkeypatch.setattr(f"cwpo_worker.{module}.PAGE_PARTS", 1)
    rows = house.rows(5000)
    job_id = house.submit(rows, merge="never")
    house.plan(job_id)
    fail_rows(house, job_id, 0, 1)
    for index in (1, 2):
        house.annotate(job_id, index)
    last = JobFolder(job_id).part(2)
    kept = house.store.read(last)
    house.store.delete(last)
    with pytest.raises(IncompleteJobError, match="part 2 is missing"):
        house.merge(job_id)
    house.store.put(last, kept)
    WatchedFileSystem.opened.clear()
    house.merge(job_id)
    # The first part is read again for its errors, the second one is not.
    read = [path[-13:] for path in WatchedFileSystem.opened if "/parts/" in path]
    assert sorted(read) == ["00000.parquet", "00002.parquet"]
    parts = parts_of(house, job_id)
    assert [row for part in parts for row in rows_of_part(house, job_id, part)] == house.expected(
        rows[1:]
    )
    assert [error["row"] for error in house.errors(job_id)] == [1]


def test_the_shards_of_a_completed_job_are_discarded(house, annotated):
    folder = JobFolder(annotated)
    discard_shards(house.lifecycle, house.store, annotated)
    assert len(house.store.list(folder.shards)) == 2  # The job is not complete.
    house.merge(annotated)
    assert len(house.store.list(folder.shards)) == 2
    for _ in range(2):
        discard_shards(house.lifecycle, house.store, annotated)
        assert house.store.list(folder.shards) == []
    assert house.results(annotated) == house.expected(house.rows(2100))


def test_a_shard_that_has_lost_rows_is_not_merged_over(house):
    job_id, shorter = house.submit(house.rows(2100)), house.submit(house.rows(2099))
    house.plan(job_id)
    house.plan(shorter)
    rows = house.store.read(JobFolder(shorter).shard(1))
    house.store.put(JobFolder(job_id).shard(1), rows)
    for index in (0, 1):
        house.annotate(job_id, index)
    with pytest.raises(IncompleteJobError, match="are 2,099 rows, of 2,100"):
        house.merge(job_id)
    assert not house.store.exists(JobFolder(job_id).results("jsonl"))


def test_each_part_is_opened_once(watched_house):
    house = watched_house
    rows = house.rows(5000)
    rows[4000] = {"prompt": "alone"}
    job_id = house.submit(rows)
    house.plan(job_id)
    for index in range(3):
        house.annotate(job_id, index)
    WatchedFileSystem.opened.clear()
    house.merge(job_id)
    parts = [path for path in WatchedFileSystem.opened if "/parts/" in path]
    assert len(parts) == len(set(parts)) == 3
    assert house.results(job_id) == house.expected(rows[:4000] + rows[4001:])


def test_a_merge_stops_when_its_job_is_cancelled(watched_house):
    house = watched_house
    rows = house.rows(5000)
    job_id = house.submit(rows)
    house.plan(job_id)
    for index in range(3):
        house.annotate(job_id, index)
    house.queue.remove([Task(job_id, "merge")])
    parts = []

    def cancel_at_the_second_part(path):
        if "/parts/" in path:
            parts.append(path)
            if len(parts) == 2:
                assert house.ledger.cancel(job_id, owner=None).state == "cancelling"

    WatchedFileSystem.watcher.append(cancel_at_the_second_part)
    with pytest.raises(JobStoppedError, match="is cancelling"):
        house.merge(job_id)
    assert not house.store.exists(JobFolder(job_id).dataset)
    assert not house.store.exists(JobFolder(job_id).results("jsonl"))
    house.reconcile()
    assert house.queue.census().of(job_id) == {Task(job_id, "merge")}
    house.merge(job_id)
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.progress.rows_done) == ("cancelled", 5000)
    assert house.results(job_id) == house.expected(rows)
