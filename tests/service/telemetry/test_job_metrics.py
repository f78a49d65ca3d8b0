"""What /metrics says of batch jobs, whose queue every service of an installation shares."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cwpo_worker.rq_worker import TaskWorker


@pytest.fixture
def house(furnish, tmp_path):
    with furnish(tmp_path) as house:
        yield house


def scrape(service):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(service.http.get("/metrics").text)
        for sample in family.samples
    }


def test_a_job_is_measured_from_its_submission_to_its_end(house, triplet, tmp_path):
    service, client = house.service, house.client
    rows = [triplet(number) for number in range(5)] + [triplet(5, response_a=" ")]
    idle = scrape(service)
    assert idle["cwpo_queue_up",] == 1
    assert (idle["cwpo_jobs", "validating"], idle["cwpo_tasks", "waiting"]) == (0, 0)
    assert idle["cwpo_jobs_ended_total", "completed"] == 0
    assert idle["cwpo_task_wait_seconds",] == idle["cwpo_tasks_refused",] == 0

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = client.jobs.create(client.files.upload(path).id)
    submitted = scrape(service)
    assert submitted["cwpo_jobs", "validating"] == submitted["cwpo_tasks", "waiting"] == 1
    assert 0 < submitted["cwpo_task_wait_seconds",] < 3600

    house.plan(job.id)
    house.annotate(job.id, 0)
    finished = scrape(service)
    assert finished["cwpo_jobs", "finalizing"] == 1
    assert finished["cwpo_job_rows_total", "annotated"] == 5

    house.lifecycle.fail(job.id, "a reason")
    client.jobs.resume(job.id)
    house.plan(job.id)
    house.annotate(job.id, 0)  # It finds its part, and counts nothing.
    house.merge(job.id)
    ended = scrape(service)
    assert ended["cwpo_job_rows_total", "annotated"] == 5
    assert ended["cwpo_jobs_ended_total", "failed"] == 1
    assert ended["cwpo_jobs_ended_total", "completed_with_errors"] == 1
    assert ended["cwpo_jobs", "finalizing"] == 0


def test_unfinished_tasks_are_those_at_work_and_those_whose_turn_has_not_come_too(
    house, monkeypatch
):
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 2)
    assert scrape(house.service)["cwpo_tasks_unfinished",] == 0
    job_id = house.submit(house.rows(128))
    house.queue.rq.empty()
    house.plan(job_id)  # 64 shards: the first two, and then four to a task.
    house.redis.zadd("rq:wip:cwpo", {f"{house.redis.lpop('rq:queue:cwpo').decode()}:at-work": 1})
    tasks = scrape(house.service)
    states = ("waiting", "running", "unqueued")
    assert [tasks["cwpo_tasks", state] for state in states] == [1, 1, 16]
    assert tasks["cwpo_tasks_unfinished",] == 18


def test_a_task_that_is_tried_again_is_counted(house):
    service = house.service
    file = service.http.post(
        "/files", content=b"{}\n", headers={"Content-Type": "application/x-ndjson"}
    ).json()
    service.http.post("/jobs", json={"file_id": file["id"]})
    (task_id,) = house.redis.lrange("rq:queue:cwpo", 0, -1)
    house.redis.zadd("rq:scheduled:cwpo", {task_id: 1})
    house.redis.delete("rq:queue:cwpo")
    delayed = scrape(service)
    assert (delayed["cwpo_tasks", "waiting"], delayed["cwpo_tasks", "delayed"]) == (0, 1)
    assert delayed["cwpo_task_retries_total",] == 0
    house.reconcile()
    queued = scrape(service)
    assert (queued["cwpo_tasks", "waiting"], queued["cwpo_tasks", "delayed"]) == (1, 0)
    assert queued["cwpo_task_retries_total",] == 1


def test_workers_and_their_reconciler_are_seen(house):
    worker = TaskWorker(house.queue, 24, lambda: None)
    none = scrape(house.service)
    assert none["cwpo_workers",] == none["cwpo_reconciler_up",] == 0
    worker.register_birth()
    house.reconcile()
    one = scrape(house.service)
    assert one["cwpo_workers",] == one["cwpo_reconciler_up",] == 1
    # What is left of a worker that was killed, and of its reconciler, when their keys expire.
    house.redis.delete(worker.key, "cwpo:reconciled")
    killed = scrape(house.service)
    assert killed["cwpo_workers",] == killed["cwpo_reconciler_up",] == 0
    worker.register_birth()
    worker.register_death()
    assert scrape(house.service)["cwpo_workers",] == 0


def test_without_its_queue_a_service_still_tells_the_rest(house):
    house.valkey.stop()
    told = scrape(house.service)
    assert told["cwpo_queue_up",] == 0
    assert ("cwpo_tasks", "waiting") not in told
    assert told["cwpo_queue_tokens",] == 0
