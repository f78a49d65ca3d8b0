"""This checkout against an earlier one: the same work through public interfaces, by turns.

EARLIER is another checkout of the project in which `make setup` has run. What is measured: pairs/s
of the annotator, triplets/s of the service and rows/s of a batch job (both with the null backend),
and optimiser steps/s of annotator training and CW-DPO, all on made-up texts. The two take turns,
and a ratio is that of their medians: above 1, this checkout is the faster.

Example:
    git worktree add ../before v0.1.0 && make -C ../before setup
    python benchmarks/against.py ../before
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
from contestants.checkout import Checkout, write_rows
from measurement import RESULTS, ROOT, backbone, machine, write

from cwpo import Client

REQUEST_TRIPLETS = 256
SHORT, LONG = 12, 90
WORDS = ("the", "model", "answers", "a", "question", "about", "basil", "and", "light", "in", "few")

# Whether each pass of a process counts: the first one does not.
PASSES = (False, True, True)

Measure = Callable[["Material"], Iterator["Comparison"]]
# Starts a process of a checkout, and gives the function that measures its rate once.
Start = Callable[[Checkout], AbstractContextManager[Callable[[], float]]]


@dataclass(frozen=True)
class Comparison:
    """Medians of both checkouts at the same work, and this one's over the other's.

    commit: of this checkout, when it was measured.
    """

    what: str
    unit: str
    before: float
    now: float
    ratio: float
    commit: str


@dataclass(frozen=True)
class Material:
    """What the measures work with; `checkouts` are the earlier one and this one."""

    checkouts: tuple[Checkout, Checkout]
    folder: Path
    rounds: int
    pairs: int
    rows: int
    seconds: float
    steps: int


def compared(
    what: str,
    unit: str,
    material: Material,
    start: Start,
    passes: Sequence[bool] = PASSES,
) -> Comparison:
    """Ask both for their rate by turns, in each round in processes of their own.

    The speed of a process varies by a tenth with where its memory happens to be, so that two
    processes alone tell little.

    Args:
        passes: whether each pass of a process counts.
    """
    asked: list[list[float]] = [[], []]
    for number in range(material.rounds):
        # The other one first in every second round, for a machine that slows down.
        order = (0, 1) if number % 2 else (1, 0)
        with ExitStack() as stack:
            rates = {
                which: stack.enter_context(start(material.checkouts[which])) for which in order
            }
            for counts in passes:
                for which in order:
                    rate = rates[which]()
                    if counts:
                        asked[which].append(rate)
    before, now = map(median, asked)
    commit = material.checkouts[1].commit
    result = Comparison(what, unit, before, now, now / before, commit)
    print(f"{what:28} {before:12,.2f} {now:12,.2f} {unit:12} {result.ratio:6.3f}", flush=True)
    return result


def triplets(count: int, words: int) -> Iterator[dict[str, object]]:
    """Made-up ones, each different."""
    for number in range(count):
        prompt, a, b = (
            " ".join(WORDS[(number * 7 + at * step) % len(WORDS)] for at in range(words))
            for step in (1, 3, 4)
        )
        yield {
            "id": str(number),
            "prompt": f"{number} {prompt}?",
            "response_a": a,
            "response_b": b,
        }


def weighted(row: Mapping[str, object]) -> dict[str, object]:
    """A triplet as a row of a weighted dataset."""
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen": row["response_a"],
        "rejected": row["response_b"],
        "confidence": 0.1 + 0.1 * (int(str(row["id"])) % 8),
        "score_chosen": 1.0,
        "score_rejected": 0.0,
        "preferred": "a",
    }


def annotator(material: Material) -> Iterator[Comparison]:
    """Pairs/s of `Annotator.annotate`, with annotators that the earlier checkout has trained."""
    pairs = write_rows(material.folder / "pairs.jsonl", triplets(material.pairs, LONG))
    labelled = (row | {"preferred": "a"} for row in triplets(60, LONG))
    data = write_rows(material.folder / "labels.jsonl", labelled)
    for name in ("minilm", "smollm2"):
        checkpoint = material.folder / name
        flags = ["--model", backbone(name), "--data", data, "--output", checkpoint]
        flags += ["--max-steps", 1, "--batch-size", 4]
        command = material.checkouts[0].cwpo("train-annotator", *flags)
        subprocess.run(command, check=True, capture_output=True)
        for dtype in ("float32", "bfloat16"):
            start = partial(annotating, checkpoint, dtype, pairs, material.pairs)
            yield compared(f"annotate, {name} {dtype}", "pairs/s", material, start)


@contextmanager
def annotating(
    checkpoint: Path, dtype: str, triplets: Path, pairs: int, one: Checkout
) -> Iterator[Callable[[], float]]:
    """Measures pairs/s of a process with an annotator."""
    process = one.annotating(checkpoint, dtype, triplets)
    try:
        yield lambda: pairs / process.seconds()
    finally:
        process.close()


def service(material: Material) -> Iterator[Comparison]:
    """Triplets/s over HTTP, one request of 256 at a time, with the null backend."""
    body = {"triplets": list(triplets(REQUEST_TRIPLETS, SHORT))}

    def rate(session: httpx2.Client) -> float:
        begun, requests = time.perf_counter(), 0
        while time.perf_counter() - begun < material.seconds:
            session.post("/annotate", json=body).raise_for_status()
            requests += 1
        return requests * REQUEST_TRIPLETS / (time.perf_counter() - begun)

    @contextmanager
    def start(one: Checkout) -> Iterator[Callable[[], float]]:
        log = material.folder / "serve.log"
        with (
            one.serving("serve", "--backend", "null", log=log) as client,
            httpx2.Client(base_url=client.url) as session,
        ):
            yield partial(rate, session)

    yield compared("service, null backend", "triplets/s", material, start)


def jobs(material: Material) -> Iterator[Comparison]:
    """Rows/s of a job from its submission to its end, with the null backend."""
    rows = write_rows(material.folder / "rows.jsonl", triplets(material.rows, SHORT))

    def rate(client: Client, file_id: str) -> float:
        begun = time.perf_counter()
        # Asked often: a job takes seconds, of which the usual half second would be a large part.
        job = client.jobs.wait(client.jobs.create(file_id).id, poll_seconds=0.02)
        seconds = time.perf_counter() - begun
        client.jobs.delete(job.id)
        return material.rows / seconds

    @contextmanager
    def start(one: Checkout) -> Iterator[Callable[[], float]]:
        with tempfile.TemporaryDirectory(dir=material.folder) as folder:
            words = ["up", "--backend", "null", "--data-dir", folder]
            with one.serving(*words, log=material.folder / "up.log") as client:
                yield partial(rate, client, client.files.upload(rows).id)

    yield compared("jobs, null backend", "rows/s", material, start)


def training(what: str, material: Material, words: list[object]) -> Comparison:
    """Optimiser steps/s of a command."""

    def rate(one: Checkout) -> float:
        output = material.folder / "training"
        shutil.rmtree(output, ignore_errors=True)
        return 1 / one.seconds_a_step(words, output, material.steps)

    def start(one: Checkout) -> AbstractContextManager[Callable[[], float]]:
        return nullcontext(partial(rate, one))

    # Each training is a process of its own, and its first step does not count.
    return compared(what, "steps/s", material, start, passes=(True,))


def bradley_terry(material: Material) -> Iterator[Comparison]:
    """Steps/s of annotator training, eight pairs a step."""
    labelled = (row | {"preferred": "a"} for row in triplets(400, LONG))
    data = write_rows(material.folder / "labelled.jsonl", labelled)
    words = ["train-annotator", "--model", backbone("minilm"), "--data", data]
    words += ["--batch-size", 8, "--validation-fraction", 0]
    yield training("Bradley-Terry, minilm", material, words)


def cw_dpo(material: Material) -> Iterator[Comparison]:
    """Steps/s of CW-DPO with LoRA, four pairs a step."""
    data = write_rows(material.folder / "weighted.jsonl", map(weighted, triplets(200, LONG)))
    words = ["align", "--model", backbone("smollm2"), "--data", data, "--lora"]
    words += ["--batch-size", 4, "--gradient-accumulation", 1]
    yield training("CW-DPO, smollm2 with LoRA", material, words)


MEASURES: dict[str, Measure] = {
    "annotator": annotator,
    "service": service,
    "jobs": jobs,
    "bradley-terry": bradley_terry,
    "cw-dpo": cw_dpo,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("earlier", type=Path, help="folder of the earlier checkout")
    parser.add_argument(
        "--only",
        choices=MEASURES,
        action="append",
        help="a part; repeatable; the others stay as they were measured on this machine",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--pairs", type=int, default=24, help="pairs a pass (default: 24)")
    parser.add_argument("--rows", type=int, default=100_000, help="rows a job (default: 100,000)")
    parser.add_argument("--seconds", type=float, default=3, help="load a pass (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps a training (default: 8)")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    checkouts = Checkout(asked.earlier.resolve()), Checkout(ROOT)
    print(f"{'':28} {'before':>12} {'now':>12} {'':12} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        sizes = (asked.rounds, asked.pairs, asked.rows, asked.seconds, asked.steps)
        material = Material(checkouts, Path(folder), *sizes)
        results = [row for part in asked.only or MEASURES for row in MEASURES[part](material)]
    path = RESULTS / "against.json"
    record = {
        "command": " ".join(["python benchmarks/against.py", *map(_without_folder, sys.argv[1:])]),
        "machine": machine(("torch", "transformers", "trl")),
        "before": checkouts[0].commit,
        "comparisons": [asdict(row) for row in results],
    }
    if asked.only is not None and path.exists():
        record["comparisons"] = _completed(record, json.loads(path.read_text()))
    write(path, record)


def _completed(record: dict[str, Any], known: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons, and those of another run on the same machine that were not made again."""
    if any(known[name] != record[name] for name in ("machine", "before")):
        return list(record["comparisons"])
    comparisons = {row["what"]: row for row in known["comparisons"]}
    return [*(comparisons | {row["what"]: row for row in record["comparisons"]}).values()]


def _without_folder(argument: str) -> str:
    """The argument without where the earlier checkout lies on this machine."""
    return f"../{Path(argument).name}" if "/" in argument else argument


if __name__ == "__main__":
    main()
