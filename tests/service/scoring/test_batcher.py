import asyncio
import threading
from dataclasses import dataclass

import numpy as np

from cwpo_annotator.encoded import EncodedText
from cwpo_annotator.scores import Scores
from cwpo_service.scoring.batcher import Batcher
from cwpo_service.scoring.device import Device
from cwpo_service.scoring.queue import PATIENCE, Entry
from cwpo_service.telemetry.metrics import Metrics
from harness import TIMEOUT


@dataclass(frozen=True)
class Word:
    value: float
    tokens: int = 1


class Gated:
    """Scores a word by its value, once its gate is open; remembers the batches."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def __call__(self, words):
        self.entered.set()
        assert self.gate.wait(TIMEOUT)
        self.batches.append([word.value for word in words])
        return Scores(np.array(self.batches[-1], np.float32))


def words(*values, tokens=1):
    return [Word(value, tokens) for value in values]


class FirstToken(Gated):
    """Scores a text by its first token."""

    def __call__(self, texts):
        return super().__call__([Word(text.ids[0]) for text in texts])


def batched(scenario, *, budget=4):
    """Run scenario(scorer, submit): the first submission holds the device."""

    async def run():
        device = Device()
        batcher = Batcher(device, Metrics(), budget=lambda: budget)
        batcher.start()
        scorer = Gated()

        async def submit(*items, priority="interactive", score=scorer, reads_once="nothing"):
            entry = Entry(items, score, reads_once)
            task = asyncio.create_task(batcher.score(entry, priority))
            # Turns of the loop: into the queue, and on to the device if that is free.
            for _ in range(3):
                await asyncio.sleep(0)
            return task

        try:
            holder = await submit(*words(0))
            await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
            result = await scenario(scorer, submit)
            scorer.gate.set()
            await holder
            return scorer.batches[1:], result
        finally:
            scorer.gate.set()
            batcher.stop()
            device.stop()

    return asyncio.run(run())


async def opened(scorer, *tasks):
    scorer.gate.set()
    return [list(scores.values) for scores in await asyncio.gather(*tasks)]


def test_waiting_requests_share_a_batch_within_the_budget():
    async def scenario(scorer, submit):
        tasks = [await submit(*words(n, n + 0.5)) for n in (1, 2, 3)]
        return await opened(scorer, *tasks)

    batches, scores = batched(scenario)
    assert batches == [[1, 1.5, 2, 2.5], [3, 3.5]]
    assert scores == [[1, 1.5], [2, 2.5], [3, 3.5]]


def test_a_big_request_is_split_and_comes_back_whole_and_in_order():
    async def scenario(scorer, submit):
        return await opened(scorer, await submit(*words(*range(1, 11))))

    batches, scores = batched(scenario)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert scores == [list(range(1, 11))]


def test_an_item_over_the_budget_is_scored_alone():
    async def scenario(scorer, submit):
        tasks = [await submit(*words(n, tokens=99 if n == 2 else 1)) for n in (1, 2, 3)]
        return await opened(scorer, *tasks)

    batches, scores = batched(scenario)
    assert batches == [[1], [2], [3]]
    assert scores == [[1], [2], [3]]


def test_a_small_request_does_not_wait_for_all_of_a_big_one():
    async def scenario(scorer, submit):
        big = await submit(*words(*range(1, 13)))
        small = await submit(*words(99))
        return await opened(scorer, big, small)

    batches, _ = batched(scenario)
    assert 99 in batches[1]


def test_interactive_goes_before_batch():
    async def scenario(scorer, submit):
        late = await submit(*words(1, 2, 3, 4), priority="batch")
        early = await submit(*words(5, 6, 7, 8))
        return await opened(scorer, late, early)

    batches, _ = batched(scenario)
    assert batches == [[5, 6, 7, 8], [1, 2, 3, 4]]


def test_batch_fills_what_interactive_leaves():
    async def scenario(scorer, submit):
        late = await submit(*words(1, 2, 3, 4), priority="batch")
        early = await submit(*words(5, 6, 7))
        return await opened(scorer, late, early)

    batches, _ = batched(scenario)
    assert batches == [[5, 6, 7, 1], [2, 3, 4]]


def test_batch_is_not_starved():
    async def scenario(scorer, submit):
        low = await submit(*words(-1, -1, -1, -1), priority="batch")
        high = [await submit(*words(n, n, n, n)) for n in range(1, 20)]
        return await opened(scorer, low, *high)

    batches, _ = batched(scenario)
    assert batches.index([-1, -1, -1, -1]) == PATIENCE


def test_a_cancelled_request_is_never_scored():
    async def scenario(scorer, submit):
        gone = await submit(*words(1, 2))
        stays = await submit(*words(3))
        gone.cancel()
        await asyncio.wait((gone,))
        return await opened(scorer, stays)

    batches, _ = batched(scenario)
    assert batches == [[3]]


def test_requests_of_different_scorers_are_not_mixed():
    other = Gated()
    other.gate.set()

    async def scenario(scorer, submit):
        tasks = [
            await submit(*words(1)),
            await submit(*words(2), score=other),
            await submit(*words(3)),
        ]
        return await opened(scorer, *tasks)

    batches, scores = batched(scenario)
    assert (batches, other.batches) == ([[1], [3]], [[2]])
    assert scores == [[1], [2], [3]]


def test_only_equal_texts_are_read_once_where_beginnings_are_not():
    texts = [EncodedText((first, 7, 7, 7)) for first in (1, 2, 1, 3, 2)]
    scorer = FirstToken()
    scorer.gate.set()

    async def scenario(holder, submit):
        task = await submit(*texts, score=scorer, reads_once="texts")
        return await opened(holder, task)

    _, scores = batched(scenario, budget=9)
    assert scorer.batches == [[1, 1, 2, 2], [3]]
    assert scores == [[1, 2, 1, 3, 2]]


def test_a_request_whose_scores_do_not_fit_together_fails_and_the_next_is_answered():
    shapes = iter([(4,), (2, 2)])

    def uneven(words):
        return Scores(np.zeros(next(shapes), np.float32))

    async def scenario(scorer, submit):
        split = await submit(*words(1, 2, 3, 4, 5, 6), score=uneven)
        fine = await submit(*words(7))
        scorer.gate.set()
        answers = asyncio.gather(split, fine, return_exceptions=True)
        return await asyncio.wait_for(answers, TIMEOUT)

    _, (failure, scores) = batched(scenario)
    assert isinstance(failure, ValueError)
    assert list(scores.values) == [7]


def test_stopping_fails_what_still_waits():
    async def run():
        device = Device()
        batcher = Batcher(device, Metrics(), budget=lambda: 4)
        batcher.start()
        scorer = Gated()
        tasks = [
            asyncio.create_task(batcher.score(Entry(words(n), scorer), "batch")) for n in (1, 2)
        ]
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        batcher.stop()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)
        scorer.gate.set()
        device.stop()
        return [error.status for error in results], batcher.is_dead

    assert asyncio.run(run()) == ([503, 503], True)
