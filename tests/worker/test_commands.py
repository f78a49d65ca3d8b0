import os
import signal
import subprocess
import sys

import pytest

from harness import TIMEOUT

CWPO = [sys.executable, "-c", "from cwpo.cli import main; main()"]


def run(*arguments, **environment):
    return subprocess.run(
        [*CWPO, "worker", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=TIMEOUT,
        check=False,
    )


def test_a_dead_redis_is_one_line(tmp_path):
    done = run("--redis-url", "redis://127.0.0.1:1/0", "--store-url", str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("cwpo worker: the job queue cannot be used: ")


def test_a_url_that_is_none_is_one_line(tmp_path):
    done = run("--redis-url", "127.0.0.1:6379", "--store-url", str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("cwpo worker: --redis-url")


def test_a_store_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--store-url", str(tmp_path / "file"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot write" in line


@pytest.mark.slow
def test_a_burst_begins_with_what_the_queue_has_lost(house):
    job_id = house.submit(house.rows(3))
    house.queue.rq.empty()
    assert house.start_worker("--burst").wait() == 0
    assert house.ledger.get(job_id, owner=None).state == "completed"


@pytest.mark.slow
def test_settings_come_from_the_environment_too(house):
    job_id = house.submit(house.rows(3))
    done = run(
        "--burst",
        CWPO_URL=house.service.url,
        CWPO_REDIS_URL=house.valkey.url,
        CWPO_STORE_URL=str(house.store_folder),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert house.ledger.get(job_id, owner=None).state == "completed"


@pytest.mark.slow
def test_the_end_is_warm_the_task_at_hand_is_finished_first(house):
    job_id = house.submit(house.rows(5000))
    house.service.gate.clear()
    worker = house.start_worker()
    house.wait_for(job_id, lambda _: house.service.requests)
    house.end_after_this_shard(worker)
    house.service.gate.set()
    assert worker.wait(TIMEOUT) == 0
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.progress.rows_done) == ("running", 2048)


@pytest.mark.slow
def test_a_worker_that_loses_its_queue_ends_with_one(house):
    worker = house.start_worker()
    house.wait_for(house.submit(b"no json\n"), lambda job: job.finished_at)
    house.valkey.stop()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(TIMEOUT) in (0, 1)


@pytest.mark.slow
def test_the_reconciler_of_a_worker_deletes_what_is_too_old(house):
    job_id = house.submit(house.rows(3))
    assert house.start_worker("--burst").wait() == 0
    assert house.ledger.get(job_id, owner=None).state == "completed"
    assert house.start_worker("--burst", "--retention-days", "1e-9").wait() == 0
    assert house.ledger.list(owner=None, state=None, limit=9, cursor=None).jobs == []


def test_help_shows_an_example():
    done = run("--help")
    assert done.returncode == 0
    assert "Example:" in done.stdout
    assert "--heartbeat-seconds" in done.stdout
