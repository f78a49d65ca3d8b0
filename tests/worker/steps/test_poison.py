"""One row that breaks the service or kills workers costs itself, and no other row."""

import subprocess
import sys

import pytest

from cwpo.errors import APIError, CwpoError
from cwpo_worker.errors import PoisonedShardError
from cwpo_worker.steps.annotate import PATIENCE

POISON = "question 777?"
TASK = """
import sys
import redis
from cwpo import Client
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.steps.annotate import annotate_shard
from cwpo_worker.storage.store import BlobStore

redis_url, store_url, url, job_id = sys.argv[1:]
store = BlobStore(store_url)
lifecycle = Lifecycle(redis.Redis.from_url(redis_url), store)
annotate_shard(lifecycle, store, Client(url, max_retries=0), job_id, 0)
"""


@pytest.fixture
def planned(house):
    house.service.poison = POISON
    job_id = house.submit(house.rows(1000))
    house.plan(job_id)
    return job_id


def all_but_the_poison(house, job_id):
    house.merge(job_id)
    rows = house.rows(1000)
    assert house.results(job_id) == house.expected(rows[:777] + rows[778:])
    (error,) = house.errors(job_id)
    assert (error["row"], error["id"], error["code"]) == (778, "row-777", "poison_row")
    return error["detail"]


def test_a_row_on_which_the_service_fails_becomes_an_error_line(house, planned):
    for _ in range(PATIENCE):
        with pytest.raises(APIError, match="on fire"):
            house.annotate(planned, 0)
    house.annotate(planned, 0)
    detail = all_but_the_poison(house, planned)
    assert detail == "the service fails on this row: the device is on fire"


@pytest.mark.slow
def test_a_row_of_which_workers_die_becomes_an_error_line(house, planned):
    arguments = [house.valkey.url, str(house.store_folder), house.service.url, planned]
    deaths = 0
    while True:
        house.service.gate.clear()
        task = subprocess.Popen([sys.executable, "-c", TASK, *arguments])
        house.service.on_poison = task.kill
        house.service.gate.set()
        if task.wait() == 0:
            break
        deaths += 1
        assert deaths < 12
    assert all_but_the_poison(house, planned) == "2 workers died of this row"


def test_a_failure_that_passes_costs_no_row(house, planned):
    for _ in range(PATIENCE):
        with pytest.raises(APIError):
            house.annotate(planned, 0)
    house.service.poison = None
    house.annotate(planned, 0)
    house.merge(planned)
    assert house.results(planned) == house.expected(house.rows(1000))


def test_a_service_that_is_away_raises_no_suspicion(house, planned):
    house.service.unavailable = True
    for _ in range(PATIENCE + 1):
        with pytest.raises(CwpoError):
            house.annotate(planned, 0)
    house.service.unavailable = False
    with pytest.raises(APIError, match="on fire"):
        house.annotate(planned, 0)


def test_a_service_that_fails_on_everything_is_not_the_fault_of_the_rows(house):
    house.service.poison = "the same"
    job_id = house.submit([{**row, "prompt": "the same"} for row in house.rows(300)])
    house.plan(job_id)
    for _ in range(PATIENCE):
        with pytest.raises(APIError):
            house.annotate(job_id, 0)
    with pytest.raises(PoisonedShardError, match="more than 16 rows"):
        house.annotate(job_id, 0)
    assert house.store.list(f"jobs/{job_id}/parts") == []
