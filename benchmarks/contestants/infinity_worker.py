"""Runs in the environment of infinity-emb: a line of [query, documents] in, raw scores out."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from infinity_emb import AsyncEmbeddingEngine, EngineArgs


async def main(folder: str, dtype: str, device: str, batch_size: int) -> None:
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=folder,
            engine="torch",
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            bettertransformer=False,
            model_warmup=False,
            trust_remote_code=False,
        )
    )
    # Whatever the libraries print, answers alone go to the pipe.
    answers, sys.stdout = sys.stdout, sys.stderr
    async with engine:
        print(json.dumps("ready"), file=answers, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            # All at once, so that its own batching sees them together.
            ranked = await asyncio.gather(
                *(
                    engine.rerank(query=query, docs=documents, raw_scores=True)
                    for query, documents in json.loads(line)
                )
            )
            scores = [scores_in_order(of_query) for of_query, *_ in ranked]
            print(json.dumps(scores), file=answers, flush=True)


def scores_in_order(ranked: list[Any]) -> list[float]:
    return [float(one.relevance_score) for one in sorted(ranked, key=lambda one: one.index)]


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
