import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.errors import OverloadedError
from cwpo.types import ModelRef
from cwpo_worker import planner, shard
from cwpo_worker.errors import JobStoppedError, ModelChangedError, StoreError
from cwpo_worker.manifest import JobFolder


@pytest.fixture
def planned(house):
    job_id = house.submit(house.rows(3000))
    planner.plan(house.ledger, job_id)
    return job_id


def annotate(house, job_id, index):
    shard.annotate(house.ledger, house.client, job_id, index)


def test_a_second_run_asks_nothing_and_changes_nothing(house, planned):
    annotate(house, planned, 0)
    part = house.ledger.store.read(JobFolder(planned).part(0))
    requests = house.service.requests
    annotate(house, planned, 0)
    assert house.service.requests == requests == 4
    assert house.ledger.store.read(JobFolder(planned).part(0)) == part


def test_a_part_is_not_there_when_the_service_was_not(house, planned):
    house.service.unavailable = True
    with pytest.raises(OverloadedError):
        annotate(house, planned, 0)
    assert house.ledger.store.list(JobFolder(planned).parts) == []


def test_the_first_answer_pins_the_annotator(house, planned):
    annotate(house, planned, 0)
    assert house.ledger.get(planned, owner=None).model == house.service.annotator.model
    house.service.model = ModelRef(name="null", revision="other")
    with pytest.raises(ModelChangedError, match="from null null to null other"):
        annotate(house, planned, 1)


def test_a_shard_of_a_job_that_was_stopped_is_left_alone(house, planned):
    house.ledger.cancel(planned, owner=None)
    with pytest.raises(JobStoppedError, match="is cancelled"):
        annotate(house, planned, 0)
    assert house.service.requests == 0


def test_a_shard_that_is_not_the_manifests_is_refused(house, planned):
    store, folder = house.ledger.store, JobFolder(planned)
    blob = store.read(folder.shard(1))
    store.put(folder.shard(1), store.read(folder.shard(0)))
    with pytest.raises(StoreError, match="has 2,048 rows where the manifest says 952"):
        annotate(house, planned, 1)
    foreign = io.BytesIO()
    pq.write_table(pa.table({"row": ["secret"], "prompt": ["p"]}), foreign)
    for damaged in (foreign.getvalue(), blob[:-100], b"secret" + blob[6:-6] + b"secret"):
        store.put(folder.shard(1), damaged)
        with pytest.raises(StoreError, match="damaged") as caught:
            annotate(house, planned, 1)
        assert "secret" not in str(caught.value)
