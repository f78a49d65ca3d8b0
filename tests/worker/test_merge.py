import pytest

from cwpo_worker import merge, planner, shard
from cwpo_worker.errors import IncompleteJobError, JobStoppedError
from cwpo_worker.manifest import JobFolder


@pytest.fixture
def annotated(house):
    """A job of two shards that is ready to be merged."""
    job_id = house.submit([*house.rows(2100), {"prompt": "alone"}])
    planner.plan(house.ledger, job_id)
    for index in (1, 0):
        shard.annotate(house.ledger, house.client, job_id, index)
    return job_id


def test_the_parts_come_in_order_whatever_the_order_they_were_made_in(house, annotated):
    merge.merge(house.ledger, annotated)
    assert house.results(annotated) == house.expected(house.rows(2100))
    assert [error["row"] for error in house.errors(annotated)] == [2101]


def test_a_second_merge_after_a_crash_finds_everything_there(house, annotated):
    store, folder = house.ledger.store, JobFolder(annotated)
    record = house.ledger.records.get(annotated)
    merge.merge(house.ledger, annotated)
    before = [store.read(folder.results(format)) for format in ("parquet", "jsonl")]
    with pytest.raises(JobStoppedError):
        merge.merge(house.ledger, annotated)
    # As if the first had died after it published: the record still says finalizing.
    house.redis.set(f"cwpo:job:{annotated}", record.model_dump_json())
    merge.merge(house.ledger, annotated)
    assert [store.read(folder.results(format)) for format in ("parquet", "jsonl")] == before
    assert house.ledger.get(annotated, owner=None).state == "completed_with_errors"


def test_a_lost_part_is_not_merged_over(house, annotated):
    house.ledger.store.delete(JobFolder(annotated).part(1))
    with pytest.raises(IncompleteJobError, match="1 parts of 2 are missing"):
        merge.merge(house.ledger, annotated)
    assert not house.ledger.store.exists(JobFolder(annotated).results("jsonl"))


def test_a_part_of_the_wrong_size_is_not_merged_over(house, annotated):
    store, folder = house.ledger.store, JobFolder(annotated)
    store.put(folder.part(0), store.read(folder.part(1)))
    with pytest.raises(IncompleteJobError, match=r"part 0 has 52 annotated .* 2,048"):
        merge.merge(house.ledger, annotated)
    assert not store.exists(folder.results("jsonl"))
