"""What the service is measured against: the least that FastAPI can do with the same request."""

from __future__ import annotations

import sys
from hashlib import sha256

import uvicorn
from fastapi import FastAPI, Request

from cwpo.types import AnnotateRequest

app = FastAPI()


@app.post("/annotate")
async def annotate(request: Request) -> dict[str, str]:
    """Validate the body and hash it."""
    body = await request.body()
    AnnotateRequest.model_validate_json(body)
    return {"sha256": sha256(body).hexdigest()}


@app.get("/health/ready")
async def ready() -> dict[str, str]:
    """Up."""
    return {}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
