"""What /metrics says of batch jobs, whose queue every service of an installation shares."""

import json

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from cwpo import Client
from cwpo_worker import merge, planner, shard
from cwpo_worker.ledger import Ledger
from cwpo_worker.reconciler import reconcile
from cwpo_worker.store import BlobStore
from cwpo_worker.valkey import EmbeddedValkey


@pytest.fixture
def valkey(tmp_path):
    with EmbeddedValkey(tmp_path / "valkey") as valkey:
        yield valkey


def scrape(service):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(service.http.get("/metrics").text)
        for sample in family.samples
    }


def test_a_job_is_measured_from_its_submission_to_its_end(serve, valkey, triplet, tmp_path):
    store = str(tmp_path / "store")
    ledger = Ledger(redis.Redis.from_url(valkey.url), BlobStore(store))
    rows = [triplet(number) for number in range(5)] + [triplet(5, response_a=" ")]
    with serve(redis_url=valkey.url, store_url=store) as service, Client(service.url) as client:
        idle = scrape(service)
        assert idle["cwpo_queue_up",] == 1
        assert (idle["cwpo_jobs", "validating"], idle["cwpo_tasks", "waiting"]) == (0, 0)
        assert idle["cwpo_jobs_ended_total", "completed"] == 0
        assert idle["cwpo_task_wait_seconds",] == 0

        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = client.jobs.create(client.files.upload(path).id)
        submitted = scrape(service)
        assert submitted["cwpo_jobs", "validating"] == submitted["cwpo_tasks", "waiting"] == 1
        assert 0 < submitted["cwpo_task_wait_seconds",] < 3600

        planner.plan(ledger, job.id)
        shard.annotate(ledger, client, job.id, 0)
        finished = scrape(service)
        assert finished["cwpo_jobs", "finalizing"] == 1
        assert finished["cwpo_job_rows_total", "annotated"] == 5

        ledger.records.fail(job.id, "a reason")
        client.jobs.resume(job.id)
        planner.plan(ledger, job.id)
        shard.annotate(ledger, client, job.id, 0)  # It finds its part, and counts nothing.
        merge.merge(ledger, job.id)
        ended = scrape(service)
        assert ended["cwpo_job_rows_total", "annotated"] == 5
        assert ended["cwpo_jobs_ended_total", "failed"] == 1
        assert ended["cwpo_jobs_ended_total", "completed_with_errors"] == 1
        assert ended["cwpo_jobs", "finalizing"] == 0


def test_a_task_that_is_tried_again_is_counted(serve, valkey, tmp_path):
    store = str(tmp_path / "store")
    ledger = Ledger(redis.Redis.from_url(valkey.url), BlobStore(store))
    with serve(redis_url=valkey.url, store_url=store) as service:
        file = service.http.post(
            "/files", content=b"{}\n", headers={"Content-Type": "application/x-ndjson"}
        ).json()
        service.http.post("/jobs", json={"file_id": file["id"]})
        (task_id,) = ledger.queue.rq.get_job_ids()
        ledger.queue.rq.empty()
        reconcile(ledger)
        ledger.redis.zadd("rq:scheduled:cwpo", {task_id: 1})
        ledger.redis.lrem("rq:queue:cwpo", 0, task_id)
        delayed = scrape(service)
        assert (delayed["cwpo_tasks", "waiting"], delayed["cwpo_tasks", "delayed"]) == (0, 1)
        assert delayed["cwpo_task_retries_total",] == 0
        reconcile(ledger)
        queued = scrape(service)
        assert (queued["cwpo_tasks", "waiting"], queued["cwpo_tasks", "delayed"]) == (1, 0)
        assert queued["cwpo_task_retries_total",] == 1


def test_without_its_queue_a_service_still_tells_the_rest(serve, valkey, tmp_path):
    with serve(redis_url=valkey.url, store_url=str(tmp_path / "store")) as service:
        valkey.stop()
        told = scrape(service)
        assert told["cwpo_queue_up",] == 0
        assert ("cwpo_tasks", "waiting") not in told
        assert told["cwpo_queue_tokens",] == 0
