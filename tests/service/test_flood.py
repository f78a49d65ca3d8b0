"""What happens at five times the capacity."""

import asyncio
import time

import httpx

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.null import NullBackend

PAIRS_PER_SECOND = 400
REQUEST = 10
REQUESTS = 1000


class Paced(NullBackend):
    """A device of known speed."""

    def score_pairs(self, pairs):
        time.sleep(len(pairs) / PAIRS_PER_SECOND)
        return super().score_pairs(pairs)


def test_at_five_times_its_capacity_it_lives_refuses_and_answers_all_it_accepted(
    serve, annotator_with, triplet
):
    triplets = [triplet(n) for n in range(REQUEST)]
    expected = [a.score_a for a in Annotator.null().annotate([Triplet(**t) for t in triplets])]
    interval = REQUEST / PAIRS_PER_SECOND / 5

    async def flood(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:

            async def ask(number):
                await asyncio.sleep(number * interval)
                return await http.post("/annotate", json={"triplets": triplets})

            async def probe():
                answers = []
                while not all(ask.done() for ask in asks):
                    answers.append(await http.get("/health/live"))
                    answers.append(await http.get("/health/ready"))
                    await asyncio.sleep(0.2)
                return answers

            asks = [asyncio.create_task(ask(number)) for number in range(REQUESTS)]
            return await probe(), await asyncio.gather(*asks)

    # A tenth of a second of work may wait.
    settings = {"queue_tokens": 2 * PAIRS_PER_SECOND // 10, "token_budget": 40}
    with serve(lambda: annotator_with(Paced()), **settings) as service:
        probes, answers = asyncio.run(flood(service.url))
        after = service.annotate(*triplets)
        waiting = "cwpo_queue_tokens 0.0" in service.http.get("/metrics").text
    assert {answer.status_code for answer in probes} == {200}
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) + len(refused) == REQUESTS
    # Most of what comes at five times the capacity cannot be served, and some of it can.
    assert len(refused) > REQUESTS / 2
    assert len(served) > REQUESTS / 20
    for answer in served:
        assert [item["score_a"] for item in answer.json()["annotations"]] == expected
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert (after.status_code, waiting) == (200, True)
