"""What happens when five times as much comes as may wait."""

import asyncio

import httpx2

from cwpo import Triplet
from cwpo_annotator import Annotator
from harness import TIMEOUT

PAIRS = 10
# Of the null encoder: one token for each of a pair's two texts.
TOKENS = 2 * PAIRS
WAITING = 20
REQUESTS = 5 * WAITING


def test_a_flood_is_refused_beyond_what_may_wait_and_all_that_was_accepted_is_answered(
    serve, annotator_with, gated, triplet
):
    triplets = [triplet(n) for n in range(PAIRS)]
    expected = [a.score_a for a in Annotator.null().annotate([Triplet(**t) for t in triplets])]

    async def flood(url):
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=TIMEOUT) as http:

            async def ask():
                return await http.post("/annotate", json={"triplets": triplets})

            async def probe():
                return [await http.get(f"/health/{what}") for what in ("live", "ready")]

            # The device is held by the first request, so that all others wait or are refused.
            asks = [asyncio.create_task(ask())]
            await asyncio.to_thread(gated.entered.acquire, timeout=TIMEOUT)
            asks += [asyncio.create_task(ask()) for _ in range(REQUESTS)]
            probes = []
            while sum(task.done() for task in asks) < REQUESTS - WAITING:
                probes += await probe()
            gated.gate.set()
            return probes, await asyncio.gather(*asks)

    settings = {"queue_tokens": WAITING * TOKENS, "token_budget": 2 * TOKENS}
    with serve(lambda: annotator_with(gated), **settings) as service:
        probes, answers = asyncio.run(flood(service.url))
        after = service.annotate(*triplets)
        waiting = "cwpo_queue_tokens 0.0" in service.http.get("/metrics").text
    assert {answer.status_code for answer in probes} == {200}
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) + len(refused) == len(answers)
    assert len(served) == 1 + WAITING
    for answer in served:
        assert [item["score_a"] for item in answer.json()["annotations"]] == expected
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert (after.status_code, waiting) == (200, True)
