"""Jobs take turns, by owner and then by job, and the queue holds a few shards of each."""

from datetime import timedelta
from itertools import islice

import pytest
from rq.executions import Execution
from rq.job import Job as QueuedTask
from rq.serializers import JSONSerializer

from cwpo.types import JobProgress
from cwpo_worker import tasks
from cwpo_worker.jobs.finished_shards import RowCounts
from cwpo_worker.jobs.record import JobRecord, now
from cwpo_worker.jobs.shard_ranges import joined, numbers_in
from cwpo_worker.jobs.turns import TURNS
from cwpo_worker.queue.task_queue import Task

LIST, SCHEDULED = "rq:queue:cwpo", "rq:scheduled:cwpo"


@pytest.fixture
def shop(house, monkeypatch):
    """The house, with shards of two rows, and tasks that run in this process."""
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 2)
    tasks.equip(tasks.Tools(house.lifecycle, house.store, house.client, timedelta.max))
    return house


def submit(house, shards, owner=None, **options):
    """A planned job of so many shards."""
    job_id = house.submit(house.rows(2 * shards), owner=owner, **options)
    house.redis.lrem(LIST, 0, Task(job_id, "plan").id)
    house.plan(job_id)
    return job_id


def take(house):
    """Begin the first task in line, as a worker does; returns it, and its end."""
    task_id = house.redis.lpop(LIST).decode()
    queued = QueuedTask.fetch(task_id, house.redis, JSONSerializer)
    with house.redis.pipeline() as pipe:
        execution = Execution.create(queued, ttl=60, pipeline=pipe)
        pipe.execute()

    def end():
        with house.redis.pipeline() as pipe:
            execution.delete(queued, pipe)
            pipe.zrem("rq:wip:cwpo", execution.composite_key)
            pipe.execute()

    return Task.parse(task_id), end


def run(house):
    """What one worker does, task by task, until nothing waits."""
    while house.redis.llen(LIST):
        task, end = take(house)
        if task.step == "shard":
            tasks.shard(task.job_id, task.index, task.count)
        elif task.step == "plan":
            tasks.plan(task.job_id, task.index or 0)
        else:
            tasks.merge(task.job_id)
        end()
        yield task


def done_by(house, count):
    """How many of the next tasks are of which job."""
    done = [task.job_id for task in islice(run(house), count)]
    return {job_id: done.count(job_id) for job_id in done}


def waiting(house):
    return [Task.parse(task_id.decode()) for task_id in house.redis.lrange(LIST, 0, -1)]


def test_the_queue_holds_a_few_tasks_of_a_large_job(shop):
    job_id = submit(shop, 64)
    # When these were queued, only the first shards of the job were planned.
    assert [str(task) for task in waiting(shop)] == ["shard 0", "shard 1"]
    for _ in islice(run(shop), 10):
        assert len(waiting(shop)) == 2
    assert [str(task) for task in waiting(shop)] == ["shard 34x4", "shard 38x4"]
    assert shop.ledger.totals().unqueued == 18 - 10 - 2
    assert len(list(run(shop))) == 8 + 1
    assert shop.ledger.get(job_id, owner=None).state == "completed"
    assert shop.results(job_id) == shop.expected(shop.rows(128))


def test_a_small_job_is_done_while_a_large_one_goes_on(shop):
    large = submit(shop, 64)
    assert done_by(shop, 5) == {large: 5}
    small = submit(shop, 1)
    assert done_by(shop, 2) == {small: 2}  # Its shard, and its merge.
    assert shop.ledger.get(small, owner=None).state == "completed"
    assert done_by(shop, 5) == {large: 5}


def test_the_jobs_of_an_owner_take_turns(shop):
    jobs = [submit(shop, 32) for _ in range(3)]
    done = done_by(shop, 30)
    assert all(abs(done[job_id] - 10) <= 1 for job_id in jobs)


def test_an_owner_of_many_jobs_has_no_more_turns_than_one_with_a_single_job(shop):
    for _ in range(6):
        submit(shop, 32, "many")
    single = submit(shop, 32, "one")
    assert abs(done_by(shop, 30)[single] - 15) <= 2


def test_an_interactive_job_goes_before_those_of_its_owner_and_no_others(shop):
    batch = submit(shop, 32, "ann")
    other = submit(shop, 32, "ben")
    interactive = submit(shop, 32, "ann", priority="interactive")
    done = done_by(shop, 30)
    assert done[batch] <= 3
    assert abs(done[interactive] - done[other]) <= 3


def test_a_job_that_waits_for_its_service_keeps_its_shards_to_itself(shop):
    job_id = submit(shop, 64)
    for _ in range(10):
        for task_id in shop.redis.lrange(LIST, 0, -1):
            shop.redis.lrem(LIST, 0, task_id)
            shop.redis.zadd(SCHEDULED, {task_id: 1e12})
        shop.lifecycle.turns.queue_next()
    assert shop.redis.zcard(SCHEDULED) <= 4
    other = submit(shop, 32)
    assert done_by(shop, 10) == {other: 10}
    assert shop.ledger.get(job_id, owner=None).state == "queued"


@pytest.mark.slow
def test_a_plan_goes_before_the_shards_that_a_task_has_not_begun(shop):
    job_id = submit(shop, 256)
    list(islice(run(shop), 2))  # These were queued when few shards were planned.
    first, end = take(shop)
    assert first.count == 8
    small = shop.submit(shop.rows(1))
    tasks.shard(job_id, first.index, first.count)
    end()
    assert shop.finished.count(job_id) == 3
    assert done_by(shop, 3) == {small: 3}
    assert done_by(shop, 1) == {job_id: 1}
    assert str(waiting(shop)[-1]) == "shard 3x7"
    list(run(shop))
    assert shop.results(job_id) == shop.expected(shop.rows(512))


def test_the_plans_of_two_large_jobs_take_turns(shop):
    rows = shop.rows(8)
    first = shop.submit_files(*([row] * 4 for row in rows[:4]), owner="ann")
    done = [next(run(shop))]
    second = shop.submit_files(*([row] * 4 for row in rows[4:]), owner="ben")
    done += run(shop)
    plans = [task.job_id for task in done if task.step == "plan"]
    assert plans == [first, second, first, second, first, second, first, second]
    shards = [at for at, task in enumerate(done) if (task.job_id, task.step) == (first, "shard")]
    last_plan = max(at for at, task in enumerate(done) if task.step == "plan")
    assert shards[0] < last_plan
    assert shop.results(second) == shop.expected([row for row in rows[4:] for _ in range(4)])


def test_a_small_job_is_planned_between_two_files_of_a_large_one(shop):
    rows = shop.rows(16)
    large = shop.submit_files(*(rows[at : at + 4] for at in range(0, 16, 4)))
    assert done_by(shop, 1) == {large: 1}
    small = shop.submit(shop.rows(1))
    assert done_by(shop, 3) == {small: 3}
    assert shop.ledger.get(large, owner=None).progress.rows_total is None


def test_the_plan_of_a_further_file_does_not_end_a_task_of_several_shards(shop):
    job_id = shop.submit_files(shop.rows(512), shop.rows(2))
    assert [str(task) for task in islice(run(shop), 1)] == ["plan"]
    assert [str(task) for task in waiting(shop)] == ["shard 0", "shard 1", "plan 1"]
    list(islice(run(shop), 2))
    shop.redis.lmove(LIST, LIST, "LEFT", "RIGHT")
    assert [str(task) for task in waiting(shop)] == ["shard 2x8", "shard 10x8", "plan 1"]
    for _ in range(2):
        task, end = take(shop)
        tasks.shard(task.job_id, task.index, task.count)
        end()
    assert str(waiting(shop)[0]) == "plan 1"
    assert shop.finished.count(job_id) == 18


def test_what_was_queued_twice_counts_once(shop):
    job_id = submit(shop, 3)
    for index in (0, 1, 0, 0):
        shop.annotate(job_id, index)
    assert shop.finished.count(job_id) == 2
    assert shop.ledger.get(job_id, owner=None).progress.rows_done == 4


def test_a_job_planned_by_a_version_without_turns_goes_on(shop):
    job_id = submit(shop, 5)
    shop.annotate(job_id, 1)
    shop.redis.delete(TURNS, LIST)
    shop.redis.delete(*shop.redis.keys(f"cwpo:job:{job_id}:*"))
    asked = shop.service.requests
    shop.reconcile()
    list(run(shop))
    assert shop.results(job_id) == shop.expected(shop.rows(10))
    assert shop.service.requests == asked + 4


def test_ended_jobs_leave_nothing_of_their_turns(shop):
    for end in ("complete", "cancel", "fail"):
        job_id = submit(shop, 3)
        shop.annotate(job_id, 0)
        if end == "cancel":
            shop.ledger.cancel(job_id, owner=None)
        elif end == "fail":
            shop.lifecycle.fail(job_id, "a reason")
        list(run(shop))
        assert shop.redis.keys(f"cwpo:job:{job_id}*") == [f"cwpo:job:{job_id}".encode()]
        assert not shop.redis.exists(TURNS)


def test_half_a_million_shards_are_a_few_kilobytes(house):
    shards = 500_000
    job_id = f"job-{'5' * 24}"
    record = JobRecord(
        id=job_id,
        state="running",
        shard_rows=2048,
        shards=shards,
        created_at=now(),
        progress=JobProgress(rows_total=shards * 2048),
    )
    house.registry.create(record)
    house.finished.add(job_id, shards - 1, RowCounts(2047, 1, 2047))
    house.reconcile()
    assert len(waiting(house)) == 2
    keys = [TURNS, *house.redis.keys(f"cwpo:job:{job_id}*")]
    assert sum(house.redis.memory_usage(key) for key in keys) < 100_000


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 0)], []),
        ([(3, 5), (0, 2)], [(0, 2), (3, 5)]),
        ([(4, 5), (0, 3), (2, 4)], [(0, 5)]),
    ],
)
def test_ranges_are_joined(ranges, expected):
    assert joined(ranges) == expected
    assert set(numbers_in(ranges)) == set(numbers_in(expected))
