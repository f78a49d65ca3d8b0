"""vLLM with prefix caching, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from cwpo import Annotation, Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.vllm.server import VllmServer


@contextmanager
def started(
    python: Path, checkpoint: Path, *, dtype: str, device: str
) -> Iterator[Callable[[list[Triplet]], list[Annotation]]]:
    """Annotates through a vLLM server that has nothing of an earlier call in its prefix cache."""
    # So that the texts of one round can be forgotten before the next.
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    server = VllmServer(python, checkpoint, dtype=dtype, on_cpu=device == "cpu")
    server.start()
    try:
        remote = Annotator.over_vllm(checkpoint, server.url, dtype=dtype)  # type: ignore[arg-type]

        def annotate(triplets: list[Triplet]) -> list[Annotation]:
            httpx2.post(f"{server.url}/reset_prefix_cache").raise_for_status()
            return remote.annotate(triplets, "prompt_left")

        yield annotate
    finally:
        server.stop()
