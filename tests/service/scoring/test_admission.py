import asyncio
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.scores import Scores
from cwpo_service.problems import ProblemError
from cwpo_service.scoring.admission import Admission
from cwpo_service.scoring.batcher import Batcher
from cwpo_service.scoring.device import Device
from cwpo_service.scoring.hosting import Hosting
from cwpo_service.scoring.queue import Entry
from cwpo_service.telemetry.metrics import Metrics
from harness import TIMEOUT


@dataclass(frozen=True)
class Text:
    tokens: int


def admitted(scenario, *, bound=10):
    """What scenario(admission, batcher) returns, with the null annotator being hosted."""

    async def run():
        device, metrics = Device(), Metrics()
        hosting = Hosting(device, lambda name: Annotator.null(), metrics.drift)
        batcher = Batcher(device, metrics, budget=lambda: 4)
        batcher.start()
        await hosting.load_first(Annotator.null, None)
        try:
            return await scenario(Admission(hosting, batcher, bound=bound), batcher)
        finally:
            batcher.stop()
            device.stop()

    return asyncio.run(run())


def test_what_is_on_its_way_to_the_queue_waits_too():
    async def scenario(admission, batcher):
        with admission.reserve(24):
            assert admission.waiting == 6
            with pytest.raises(ProblemError, match="6 tokens are waiting"), admission.reserve(20):
                pass
            with admission.reserve(16):
                assert admission.waiting == 10
        assert admission.waiting == 0

    admitted(scenario)


def test_where_nothing_waits_any_request_is_taken():
    async def scenario(admission, batcher):
        with admission.reserve(4000) as reservation:
            assert reservation.tokens == 1000

    admitted(scenario)


def test_a_body_that_stands_for_more_than_it_has_needs_room_for_all_of_it():
    async def scenario(admission, batcher):
        with admission.reserve(8) as alone:
            # Nothing waits but the request itself.
            admission.extend(alone, 80)
            assert admission.waiting == 20
            admission.extend(alone, 16)
            with admission.reserve(4) as second:
                with pytest.raises(ProblemError, match="4 tokens are waiting"):
                    admission.extend(second, 28)
                admission.extend(second, 24)
                assert admission.waiting == 10
        assert admission.waiting == 0

    admitted(scenario)


def test_how_many_tokens_a_body_has_is_learnt_from_those_before():
    async def scenario(admission, batcher):
        for _ in range(20):
            with admission.reserve(100) as reservation:
                admission.settle(reservation, 1)
                assert admission.waiting == 0
        with admission.reserve(100), admission.reserve(900), pytest.raises(ProblemError):
            admission.check(100)

    admitted(scenario)


def test_a_body_without_a_sound_item_teaches_nothing():
    async def scenario(admission, batcher):
        with admission.reserve(400) as reservation:
            admission.settle(reservation, 0)
        with admission.reserve(4) as reservation:
            assert reservation.tokens == 1

    admitted(scenario)


def test_over_its_bound_the_queue_refuses_with_the_time_to_wait():
    gate, entered = threading.Event(), threading.Event()

    def score(texts):
        entered.set()
        assert gate.wait(TIMEOUT)
        return Scores(np.zeros(len(texts), np.float32))

    async def scenario(admission, batcher):
        # One token took some time, so that thousands take longer than we let anyone wait.
        slow = asyncio.create_task(batcher.score(Entry([Text(1)], score), "batch"))
        await asyncio.to_thread(entered.wait, TIMEOUT)
        waiting = asyncio.create_task(batcher.score(Entry([Text(3)], score), "batch"))
        await asyncio.sleep(0)
        with pytest.raises(ProblemError, match="3 tokens are waiting") as before_any_was_scored:
            admission.check(12)
        entered.clear()
        gate.set()
        await asyncio.gather(slow, waiting)
        gate.clear()
        entered.clear()
        running = asyncio.create_task(batcher.score(Entry([Text(1)], score), "batch"))
        await asyncio.to_thread(entered.wait, TIMEOUT)
        many = asyncio.create_task(batcher.score(Entry([Text(10**12)], score), "batch"))
        await asyncio.sleep(0)
        with pytest.raises(ProblemError) as error:
            admission.check(4)
        gate.set()
        await asyncio.gather(running, many)
        return before_any_was_scored.value, error.value

    first, later = admitted(scenario, bound=5)
    assert (first.status, later.status) == (429, 429)
    assert 1 <= int(first.headers["Retry-After"]) <= 2
    assert 60 <= int(later.headers["Retry-After"]) <= 90


def test_those_who_are_refused_do_not_all_come_back_at_once():
    told = {
        int(ProblemError(429, "", reason="overloaded", retry_after=60).headers["Retry-After"])
        for _ in range(100)
    }
    assert len(told) > 10
    assert min(told) >= 60


def test_a_drain_admits_nobody_and_waits_for_the_admitted():
    async def scenario(admission, batcher):
        with admission.reserve(4):
            draining = asyncio.create_task(admission.drain(TIMEOUT))
            await asyncio.sleep(0)
            with pytest.raises(ProblemError, match="draining"):
                admission.check(4)
            assert not draining.done()
        await asyncio.wait_for(draining, TIMEOUT)
        assert admission.is_idle

    admitted(scenario)
