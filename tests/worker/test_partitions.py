"""Whatever the cut, the order, the repetition: the dataset is that of the input, or none is."""

import json
import random
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwpo.types import FINAL_STATES, JobRequest
from cwpo_worker.errors import IllegalTransitionError, IncompleteJobError, JobStoppedError
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.jobs.record import TRANSITIONS

few = settings(
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
bad_or_good = st.lists(st.booleans(), min_size=1, max_size=40)


@pytest.fixture
def planned(house, monkeypatch):
    """`planned(is_good, shard_rows)`: a planned job of such rows, its shards of that many."""

    def plan(is_good, shard_rows):
        monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", shard_rows)
        rows = [
            row if good else {"prompt": "alone"}
            for row, good in zip(house.rows(len(is_good)), is_good, strict=True)
        ]
        job_id = house.submit(rows)
        house.plan(job_id)
        return job_id, [row for row in rows if len(row) > 1]

    return plan


@few
@given(bad_or_good, st.integers(1, 12), st.integers(0, 1 << 16), st.integers(0, 5))
def test_any_partition_in_any_order_with_any_duplicate_is_the_input(
    house, planned, is_good, shard_rows, seed, twice
):
    job_id, good = planned(is_good, shard_rows)
    manifest = JobFolder(job_id).read_manifest(house.store)
    dice = random.Random(seed)
    indices = list(manifest.numbers)
    order = dice.sample(indices, len(indices))
    for index in [*order, *dice.choices(order, k=twice if order else 0)]:
        with suppress(JobStoppedError):  # A duplicate that comes when all are finished.
            house.annotate(job_id, index)
    house.merge(job_id)
    assert house.results(job_id) == house.expected(good)
    failed = [number for number, ok in enumerate(is_good, 1) if not ok]
    assert [error["row"] for error in house.errors(job_id)] == failed
    state = "completed_with_errors" if failed else "completed"
    assert house.ledger.get(job_id, owner=None).state == state


@pytest.mark.slow
@few
@given(st.integers(2, 6), st.data())
def test_parts_that_do_not_tile_the_input_are_never_merged(house, planned, shards, data):
    job_id, _ = planned([True] * shards * 2, 2)
    for index in range(shards):
        house.annotate(job_id, index)
    store, folder = house.store, JobFolder(job_id)
    index = data.draw(st.integers(0, shards - 1))
    if data.draw(st.booleans()):
        store.delete(folder.part(index))
    else:
        # Of one row: each shard has two.
        other, _ = planned([True], 2)
        house.annotate(other, 0)
        store.put(folder.part(index), store.read(JobFolder(other).part(0)))
    with pytest.raises(IncompleteJobError):
        house.merge(job_id)
    assert not store.exists(folder.results("jsonl"))


STEPS = ("cancel", "resume", "fail", "plan", "shard 0", "merge", "reconcile", "wipe")


@pytest.mark.slow
@few
@given(st.lists(st.sampled_from(STEPS), max_size=12))
def test_after_any_steps_in_any_order_a_job_still_comes_to_its_dataset(house, steps):
    rows = house.rows(3)
    ledger = house.ledger
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    asked = JobRequest(file_id=house.upload(data))
    job_id = ledger.submit(asked, owner=None, idempotency_key=None).id
    actions = {
        "cancel": lambda: ledger.cancel(job_id, owner=None),
        "resume": lambda: ledger.resume(job_id, owner=None),
        "fail": lambda: house.lifecycle.fail(job_id, "a reason"),
        "plan": lambda: house.plan(job_id),
        "shard 0": lambda: house.annotate(job_id, 0),
        "merge": lambda: house.merge(job_id),
        "reconcile": house.reconcile,
        "wipe": lambda: (house.redis.flushall(), house.reconcile()),
    }
    state = "validating"

    def take(step):
        nonlocal state
        with suppress(IllegalTransitionError, JobStoppedError):
            actions[step]()
        job = ledger.get(job_id, owner=None)
        assert job.state in reachable(state)
        assert (job.finished_at is not None) == (job.state in FINAL_STATES)
        state = job.state

    for step in (*steps, "reconcile", "merge", "resume", "plan", "shard 0", "merge"):
        take(step)
    assert state == "completed"
    assert house.results(job_id) == house.expected(rows)


def reachable(state):
    """The states that the table lets a job come to from this one."""
    reached, frontier = set(), {state}
    while frontier:
        reached |= frontier
        frontier = set().union(*(TRANSITIONS[s] for s in frontier)) - reached
    return reached
