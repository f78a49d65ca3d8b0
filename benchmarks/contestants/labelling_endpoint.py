"""What the service is measured against too: the same answer from FastAPI alone."""

from __future__ import annotations

import sys
from math import tanh
from zlib import crc32

import uvicorn
from fastapi import FastAPI

from cwpo.types import (
    AnnotateRequest,
    AnnotateResponse,
    Annotation,
    ModelRef,
    Preference,
    Triplet,
    Usage,
)

app = FastAPI()


@app.post("/annotate")
async def annotate(body: AnnotateRequest) -> AnnotateResponse:
    """Label every triplet by a hash of its texts."""
    return AnnotateResponse(
        annotations=[label(str(at), triplet) for at, triplet in enumerate(body.triplets)],
        model=ModelRef(name="plain", revision="1"),
        usage=Usage(triplets=len(body.triplets), tokens=2 * len(body.triplets)),
    )


@app.get("/health/ready")
async def ready() -> dict[str, str]:
    """Up."""
    return {}


def label(position: str, triplet: Triplet) -> Annotation:
    """The label of one triplet."""
    prompt = crc32(str(triplet.prompt).encode())
    a, b = score(prompt, triplet.response_a), score(prompt, triplet.response_b)
    preferred: Preference = "tie" if a == b else "a" if a > b else "b"
    return Annotation(
        id=triplet.id or position,
        preferred=preferred,
        confidence=tanh(abs(a - b) / 2),
        score_a=a,
        score_b=b,
    )


def score(prompt: int, response: str) -> float:
    """Uniform in [-4, 4)."""
    return (crc32(response.encode(), prompt) / 2**32 - 0.5) * 8


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
