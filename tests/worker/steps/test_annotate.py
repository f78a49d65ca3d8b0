import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.errors import ModelRevisionError, OverloadedError
from cwpo.types import ModelRef
from cwpo_worker.errors import JobStoppedError, StoreError
from cwpo_worker.jobs.manifest import JobFolder


@pytest.fixture
def planned(house):
    job_id = house.submit(house.rows(3000))
    house.plan(job_id)
    return job_id


def test_a_second_run_asks_nothing_and_changes_nothing(house, planned):
    house.annotate(planned, 0)
    part = house.store.read(JobFolder(planned).part(0))
    requests = house.service.requests
    house.annotate(planned, 0)
    assert house.service.requests == requests == 4
    assert house.store.read(JobFolder(planned).part(0)) == part


@pytest.mark.parametrize("is_chat", [False, True])
def test_rows_of_a_prompt_are_asked_about_together_and_stay_in_order(house, is_chat):
    rows = house.rows(2000)
    for number, row in enumerate(rows):
        prompt = f"prompt {number % 100}"
        row["prompt"] = [{"role": "user", "content": prompt}] if is_chat else prompt
    job_id = house.submit(rows)
    house.plan(job_id)
    house.annotate(job_id, 0)
    house.merge(job_id)
    assert house.results(job_id) == house.expected(rows)
    assert sum(len({str(prompt) for prompt in asked}) for asked in house.service.prompts) == 100


def test_requests_end_between_prompts_unless_one_has_more_rows(house):
    rows = house.rows(1700)
    prompts = [str(number // 60) for number in range(1100)] + ["x"] * 600
    for row, prompt in zip(rows, prompts, strict=True):
        row["prompt"] = prompt
    job_id = house.submit([rows[number * 7 % 1700] for number in range(1700)])
    house.plan(job_id)
    house.annotate(job_id, 0)
    asked = house.service.prompts
    assert sum(map(len, asked)) == 1700
    # Two are sent at a time: the last one, which is short, need not arrive last.
    sizes = sorted(map(len, asked))
    assert sizes[1] >= 256
    assert sizes[-1] <= 512
    requests_of = Counter(prompt for of_request in asked for prompt in set(of_request))
    assert requests_of.pop("x") == 2
    assert set(requests_of.values()) == {1}


def test_a_part_is_not_there_when_the_service_was_not(house, planned):
    house.service.unavailable = True
    with pytest.raises(OverloadedError):
        house.annotate(planned, 0)
    assert house.store.list(JobFolder(planned).parts) == []


def test_the_first_answer_pins_the_annotator(house, planned):
    house.annotate(planned, 0)
    assert house.ledger.get(planned, owner=None).model == house.service.annotator.model
    house.service.model = ModelRef(name="null", revision="other")
    with pytest.raises(ModelRevisionError, match="hosts other, not null"):
        house.annotate(planned, 1)


def test_a_shard_of_a_job_that_was_stopped_is_left_alone(house, planned):
    house.ledger.cancel(planned, owner=None)
    with pytest.raises(JobStoppedError, match="is cancelled"):
        house.annotate(planned, 0)
    assert house.service.requests == 0


def test_a_shard_that_is_damaged_is_refused(house, planned):
    store, folder = house.store, JobFolder(planned)
    blob = store.read(folder.shard(1))
    foreign = io.BytesIO()
    pq.write_table(pa.table({"row": ["secret"], "prompt": ["p"]}), foreign)
    for damaged in (foreign.getvalue(), blob[:-100], b"secret" + blob[6:-6] + b"secret"):
        store.put(folder.shard(1), damaged)
        with pytest.raises(StoreError, match="damaged") as caught:
            house.annotate(planned, 1)
        assert "secret" not in str(caught.value)
