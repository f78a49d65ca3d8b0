import os
import pickle
import time

import pytest
import rq
from rq.job import Callback
from rq.serializers import DefaultSerializer, JSONSerializer

from cwpo_worker.queue.task_queue import NAME, Task
from cwpo_worker.rq_worker import TaskWorker
from harness import TIMEOUT


def run_worker(house):
    assert house.start_worker("--burst").wait() == 0


def foreign(house, tmp_path, name, **options):
    """A call that would leave a file behind, put into our queue by somebody else."""
    queue = rq.Queue(NAME, connection=house.redis, serializer=JSONSerializer)
    return queue.enqueue(name, str(tmp_path / "trace"), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["os.mkdir", "cwpo_worker.tasks.equip", "cwpo_worker.tasks"])
def test_a_function_that_is_no_task_is_refused_before_it_runs(house, tmp_path, name):
    queued = foreign(house, tmp_path, name)
    run_worker(house)
    assert not (tmp_path / "trace").exists()
    assert queued.get_status() == "failed"
    assert queued.id in house.queue.rq.failed_job_registry.get_job_ids()


@pytest.mark.slow
def test_a_task_with_a_foreign_callback_is_refused(house, capfd):
    queue = rq.Queue(NAME, connection=house.redis, serializer=JSONSerializer)
    callback = Callback("builtins.print")
    queued = queue.enqueue("cwpo_worker.tasks.plan", f"job-{'0' * 24}", on_success=callback)
    run_worker(house)
    assert queued.get_status() == "failed"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "refused" in printed.err


@pytest.mark.slow
def test_a_pickle_is_never_opened(house, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "trace"), "w"))

    queue = rq.Queue(NAME, connection=house.redis, serializer=DefaultSerializer)
    queued = queue.enqueue("cwpo_worker.tasks.plan", Bomb())
    assert b"reduce" not in pickle.dumps("x")
    run_worker(house)
    assert not (tmp_path / "trace").exists()
    assert queued.get_status() == "failed"


@pytest.mark.slow
def test_refused_calls_leave_the_worker_to_the_others(house, tmp_path):
    foreign(house, tmp_path, "os.mkdir")
    job_id = house.submit(house.rows(3))
    run_worker(house)
    assert house.ledger.get(job_id, owner=None).state == "completed"


@pytest.mark.slow
def test_a_worker_gives_signs_of_life_for_probes_while_nothing_comes(house, tmp_path):
    sign = tmp_path / "alive"
    worker = house.start_worker("--heartbeat-file", str(sign))
    deadline = time.monotonic() + TIMEOUT
    while not rq.Worker.all(house.redis):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Its start gives several; as if it had hung since.
    time.sleep(2)
    os.utime(sign, (1, 1))
    while sign.stat().st_mtime == 1:
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_heartbeat_file_that_cannot_be_written_is_one_line(house, tmp_path, capfd):
    worker = house.start_worker("--heartbeat-file", str(tmp_path / "missing" / "alive"))
    assert worker.wait(TIMEOUT) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "--heartbeat-file" in line


def test_a_task_is_named_by_its_id():
    for task in (
        Task(f"job-{'a' * 24}", "plan"),
        Task(f"job-{'a' * 24}", "shard", 123456),
        Task(f"job-{'a' * 24}", "merge"),
    ):
        assert Task.parse(task.id) == task
    assert Task.parse("6a8b4c") is None


def test_plans_and_merges_overtake_shards(house):
    one, two = f"job-{'1' * 24}", f"job-{'2' * 24}"
    for index in (0, 1):
        house.queue.enqueue(Task(one, "shard", index), at_front=False)
    house.queue.enqueue(Task(two, "plan"))
    assert house.queue.rq.job_ids == [
        Task(two, "plan").id,
        Task(one, "shard", 0).id,
        Task(one, "shard", 1).id,
    ]


def test_workers_fork(house):
    assert issubclass(TaskWorker, rq.Worker)
    assert not issubclass(TaskWorker, rq.SimpleWorker)
