"""What the service is measured against: FastAPI validating and hashing the same request."""

from __future__ import annotations

import sys
from hashlib import sha256

import uvicorn
from fastapi import FastAPI, Request

from cwpo.types import AnnotateRequest

app = FastAPI()


@app.post("/annotate")
async def annotate(request: Request) -> dict[str, str]:
    """The least that FastAPI can do: pydantic reads the bytes of the body."""
    body = await request.body()
    AnnotateRequest.model_validate_json(body)
    return {"sha256": sha256(body).hexdigest()}


@app.post("/typed")
async def typed(body: AnnotateRequest, request: Request) -> dict[str, str]:
    """As FastAPI's documentation writes an endpoint, with the body as a parameter."""
    return {"sha256": sha256(await request.body()).hexdigest()}


@app.get("/health/ready")
async def ready() -> dict[str, str]:
    """Up."""
    return {}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
