"""A batch job of the service, from the rows that are uploaded to the dataset that comes back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import servers
from numpy.typing import NDArray

from cwpo import Client, Triplet

POLL_SECONDS = 0.1


@contextmanager
def started(
    checkpoint: Path, *, dtype: str, threads: int
) -> Iterator[Callable[[list[Triplet]], NDArray[np.float32]]]:
    """Scores of responses a and b, shape (triplets, 2), by jobs of `cwpo up` with one worker."""
    options = ("--annotator", str(checkpoint), "--dtype", dtype, "--threads", str(threads))
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.up(folder, *options, "--workers", "1") as (url, _),
        Client(url) as client,
    ):
        yield lambda triplets: scores(client, triplets, Path(folder))


def scores(client: Client, triplets: list[Triplet], folder: Path) -> NDArray[np.float32]:
    source = folder / "triplets.jsonl"
    rows = [{**triplet.model_dump(), "id": str(row)} for row, triplet in enumerate(triplets)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    job = client.jobs.create(client.files.upload(source).id, truncation="prompt_left")
    job = client.jobs.wait(job.id, poll_seconds=POLL_SECONDS)
    dataset = client.jobs.download(job.id, folder / "weighted.jsonl", format="jsonl")
    labels = map(json.loads, dataset.read_text().splitlines())
    return np.array([of_responses(label) for label in labels], np.float32)


def of_responses(label: dict[str, Any]) -> list[float]:
    """The scores of response a and of response b, in this order."""
    found = [label["score_chosen"], label["score_rejected"]]
    return found[::-1] if label["preferred"] == "b" else found
