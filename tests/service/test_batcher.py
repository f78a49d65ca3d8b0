import asyncio
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from cwpo_service.admission import Admission
from cwpo_service.batcher import Batcher
from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError
from cwpo_service.queue import PATIENCE


@dataclass(frozen=True)
class Word:
    value: float
    tokens: int = 1


class Device:
    """Scores a word by its value, once its gate is open; remembers the batches."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def __call__(self, words):
        self.entered.set()
        assert self.gate.wait(30)
        self.batches.append([word.value for word in words])
        return np.array(self.batches[-1], np.float32)


def words(*values, tokens=1):
    return [Word(value, tokens) for value in values]


def size_of(items):
    """The bytes of a body that is taken to have as many tokens."""
    return 4 * sum(item.tokens for item in items)


def batched(scenario, *, budget=4, bound=1000):
    """Run scenario(batcher, device, submit): the first submission holds the device."""

    async def run():
        batcher = Batcher(Metrics(), budget=lambda: budget, bound=bound)
        batcher.start()
        device = Device()

        async def ask(items, score, priority):
            with batcher.admission.room(size_of(items)) as room:
                return await batcher.score(items, score, priority, room)

        async def submit(*items, priority="interactive", score=device):
            task = asyncio.create_task(ask(items, score, priority))
            # Two turns of the loop: into the queue, and on to the device if that is free.
            for _ in range(3):
                await asyncio.sleep(0)
            return task

        try:
            holder = await submit(*words(0))
            await asyncio.to_thread(device.entered.wait, 30)
            result = await scenario(batcher, device, submit)
            device.gate.set()
            await holder
            return device.batches[1:], result
        finally:
            device.gate.set()
            batcher.stop()

    return asyncio.run(run())


async def opened(device, *tasks):
    device.gate.set()
    return [list(scores) for scores in await asyncio.gather(*tasks)]


def test_waiting_requests_share_a_batch_within_the_budget():
    async def scenario(batcher, device, submit):
        tasks = [await submit(*words(n, n + 0.5)) for n in (1, 2, 3)]
        return await opened(device, *tasks)

    batches, scores = batched(scenario)
    assert batches == [[1, 1.5, 2, 2.5], [3, 3.5]]
    assert scores == [[1, 1.5], [2, 2.5], [3, 3.5]]


def test_a_big_request_is_split_and_comes_back_whole_and_in_order():
    async def scenario(batcher, device, submit):
        return await opened(device, await submit(*words(*range(1, 11))))

    batches, scores = batched(scenario)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert scores == [list(range(1, 11))]


def test_an_item_over_the_budget_is_scored_alone():
    async def scenario(batcher, device, submit):
        tasks = [await submit(*words(n, tokens=99 if n == 2 else 1)) for n in (1, 2, 3)]
        return await opened(device, *tasks)

    batches, scores = batched(scenario)
    assert batches == [[1], [2], [3]]
    assert scores == [[1], [2], [3]]


def test_a_small_request_does_not_wait_for_all_of_a_big_one():
    async def scenario(batcher, device, submit):
        big = await submit(*words(*range(1, 13)))
        small = await submit(*words(99))
        return await opened(device, big, small)

    batches, _ = batched(scenario)
    assert 99 in batches[1]


def test_interactive_goes_before_batch():
    async def scenario(batcher, device, submit):
        late = await submit(*words(1, 2, 3, 4), priority="batch")
        early = await submit(*words(5, 6, 7, 8))
        return await opened(device, late, early)

    batches, _ = batched(scenario)
    assert batches == [[5, 6, 7, 8], [1, 2, 3, 4]]


def test_batch_fills_what_interactive_leaves():
    async def scenario(batcher, device, submit):
        late = await submit(*words(1, 2, 3, 4), priority="batch")
        early = await submit(*words(5, 6, 7))
        return await opened(device, late, early)

    batches, _ = batched(scenario)
    assert batches == [[5, 6, 7, 1], [2, 3, 4]]


def test_batch_is_not_starved():
    async def scenario(batcher, device, submit):
        low = await submit(*words(-1, -1, -1, -1), priority="batch")
        high = [await submit(*words(n, n, n, n)) for n in range(1, 20)]
        return await opened(device, low, *high)

    batches, _ = batched(scenario)
    assert batches.index([-1, -1, -1, -1]) == PATIENCE


def test_a_cancelled_request_is_never_scored():
    async def scenario(batcher, device, submit):
        gone = await submit(*words(1, 2))
        stays = await submit(*words(3))
        gone.cancel()
        await asyncio.wait((gone,))
        return await opened(device, stays)

    batches, _ = batched(scenario)
    assert batches == [[3]]


def test_requests_of_different_scorers_are_not_mixed():
    other = Device()
    other.gate.set()

    async def scenario(batcher, device, submit):
        tasks = [
            await submit(*words(1)),
            await submit(*words(2), score=other),
            await submit(*words(3)),
        ]
        return await opened(device, *tasks)

    batches, scores = batched(scenario)
    assert (batches, other.batches) == ([[1], [3]], [[2]])
    assert scores == [[1], [2], [3]]


def test_over_its_bound_the_queue_refuses_with_the_time_to_wait():
    async def scenario(batcher, device, submit):
        waiting = await submit(*words(1, 2, 3))
        refused = await submit(*words(4, 5, 6))
        with pytest.raises(ProblemError, match="3 tokens are waiting") as error:
            await refused
        await opened(device, waiting)
        return error.value

    _, error = batched(scenario, bound=5)
    assert error.status == 429
    assert int(error.headers["Retry-After"]) >= 1


def test_what_is_on_its_way_to_the_queue_waits_too():
    admission = Admission(10, queued=lambda: 0)
    with admission.room(24):
        assert admission.waiting == 6
        with pytest.raises(ProblemError, match="6 tokens are waiting"), admission.room(20):
            pass
        with admission.room(16):
            assert admission.waiting == 10
    assert admission.waiting == 0


def test_where_nothing_waits_any_request_is_taken():
    with Admission(10, queued=lambda: 0).room(4000) as room:
        assert room.tokens == 1000


def test_how_many_tokens_a_body_has_is_learnt_from_those_before():
    admission = Admission(10, queued=lambda: 0)
    for _ in range(20):
        with admission.room(100) as room:
            admission.settle(room, 1)
            assert admission.waiting == 0
    with admission.room(100), admission.room(900), pytest.raises(ProblemError):
        admission.check(100)


def test_a_body_without_a_sound_item_teaches_nothing():
    admission = Admission(10, queued=lambda: 0)
    with admission.room(400) as room:
        admission.settle(room, 0)
    with admission.room(4) as room:
        assert room.tokens == 1


def test_retry_after_follows_the_rate_at_which_the_queue_drains():
    async def scenario(batcher, device, submit):
        device.gate.set()
        # One token took the whole time up to now, so thousands take longer than we let anyone wait.
        while not device.batches:
            await asyncio.sleep(0.001)
        device.gate.clear()
        device.entered.clear()
        running = await submit(*words(0))
        await asyncio.to_thread(device.entered.wait, 30)
        waiting = await submit(Word(1, tokens=10**9))
        with pytest.raises(ProblemError) as error:
            batcher.admission.check(4)
        await opened(device, running, waiting)
        return error.value

    _, error = batched(scenario)
    assert error.headers["Retry-After"] == "60"


def test_stopping_fails_what_still_waits():
    async def run():
        batcher = Batcher(Metrics(), budget=lambda: 4, bound=1000)
        batcher.start()
        device = Device()
        with batcher.admission.room(8) as room:
            tasks = [
                asyncio.create_task(batcher.score(words(n), device, "batch", room)) for n in (1, 2)
            ]
        await asyncio.to_thread(device.entered.wait, 30)
        batcher.stop()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        device.gate.set()
        return [error.status for error in results], batcher.is_dead

    assert asyncio.run(run()) == ([503, 503], True)
