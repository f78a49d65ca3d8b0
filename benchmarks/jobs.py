"""A batch job end to end through `cwpo up` with the null annotator, against a bare loop.

Example:
    python benchmarks/jobs.py --rows 1000000 --workers 1 2 4
    python benchmarks/jobs.py --rows 20000000 --files 100 --workers 2 \\
        --output benchmarks/results/jobs_20m.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import get_args

import measurement
import psutil
import servers

from cwpo import Client
from cwpo.datasets.triplets import NumberedTriplet, read_triplets
from cwpo.types import FINAL_STATES, Merge
from cwpo_annotator import Annotator

RESULTS = measurement.RESULTS / "jobs.json"
SAMPLE_SECONDS = 0.25
LOOP_ROWS = 256
LOOP_MOST_ROWS = 1_000_000
WORDS = ("the", "model", "answers", "a", "question", "about", "basil", "and", "light")


@dataclass
class Run:
    """What one job took.

    seconds: of the uploads and of the job.
    memory_mb: peak resident memory of one process of each kind, over the first half of the run
    and over the second: flat means that the second is no higher.
    """

    workers: int
    rows: int
    files: int
    seconds: float
    rows_per_second: float
    upload_seconds: float
    first_result_seconds: float
    state_seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    memory_mb: dict[str, tuple[float, float]] = field(default_factory=dict)


class Sampler(threading.Thread):
    """Watches memory and CPU time of a process and all that it started."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, str, float]] = []
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self._root = psutil.Process(root)
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._sample()

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        self._sample()

    def cpu_seconds(self) -> dict[str, float]:
        """By kind of process; of tasks, which end between two samples, through their worker."""
        totals: dict[str, float] = defaultdict(float)
        for kind, seconds in self._cpu.values():
            totals[kind] += seconds
        return {kind: round(seconds, 1) for kind, seconds in totals.items()}

    def memory_mb(self) -> dict[str, tuple[float, float]]:
        """Peaks by kind, before and after the middle of the run."""
        middle = median(at for at, _, _ in self.samples)
        peaks: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for at, kind, size in self.samples:
            half = int(at > middle)
            peaks[kind][half] = max(peaks[kind][half], size)
        return {kind: (first, second) for kind, (first, second) in peaks.items()}

    def _sample(self) -> None:
        now = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess), process.oneshot():
                    kind = _kind(process)
                    size = process.memory_info().rss / 1e6
                    self.samples.append((now, kind, round(size, 1)))
                    times = process.cpu_times()
                    spent = times.user + times.system
                    if kind == "worker":
                        spent += times.children_user + times.children_system
                    if kind != "task":
                        self._cpu[process.pid, process.create_time()] = (kind, spent)


def _kind(process: psutil.Process) -> str:
    command = process.cmdline() or [""]  # Empty between fork and exec.
    if "valkey" in command[0]:
        return "valkey"
    if "serve" in command:
        return "service"
    if "up" in command:
        return "supervisor"
    parent = process.parent()
    return "task" if parent is not None and "worker" in parent.cmdline() else "worker"


def write_rows(path: Path, count: int, first: int = 0) -> None:
    """Rows of about 400 bytes from a number on, each with texts of its own."""

    def text(number: int, words: int) -> str:
        return f"{number} " + " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(words))

    with path.open("w") as sink:
        for number in range(first, first + count):
            row = {
                "id": f"row-{number}",
                "prompt": text(number, 20),
                "response_a": text(number + 1, 25),
                "response_b": text(number + 2, 25),
            }
            sink.write(json.dumps(row) + "\n")


def bare_loop(path: Path) -> dict[str, float]:
    """Read, annotate, forget: the least that any pipeline does, in one process."""
    annotator = Annotator.null()

    def annotated() -> int:
        rows = 0
        with path.open("rb") as source:
            items = read_triplets(source, "jsonl")
            while batch := list(islice(items, LOOP_ROWS)):
                triplets = [item.triplet for item in batch if isinstance(item, NumberedTriplet)]
                rows += len(annotator.annotate(triplets))
        return rows

    seconds, rows = measurement.timed(annotated)
    return {"seconds": round(seconds, 2), "rows_per_second": round(rows / seconds)}


def measure(rows: int, files: int, workers: int, merge: Merge) -> Run:
    """One job in a fresh data folder, from the first byte uploaded to its last state."""
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.up(folder, "--backend", "null", "--workers", str(workers)) as (url, pid),
    ):
        sampler = Sampler(pid)
        sampler.start()
        run = _follow(url, rows, files, workers, merge)
        sampler.stop()
        run.memory_mb = sampler.memory_mb()
        run.cpu_seconds = sampler.cpu_seconds()
    return run


def _follow(url: str, rows: int, files: int, workers: int, merge: Merge) -> Run:
    states: dict[str, float] = defaultdict(float)
    first = None
    with Client(url) as client:
        file_ids, upload_seconds = _uploaded(client, rows, files)
        submitted = last = time.monotonic()
        job = client.jobs.create(file_ids=file_ids, merge=merge)
        while job.state not in FINAL_STATES:
            time.sleep(0.1)
            job = client.jobs.get(job.id)
            now = time.monotonic()
            states[job.state] += now - last
            last = now
            if first is None and job.progress.rows_done:
                first = now - submitted
    assert job.state == "completed", job
    assert job.progress.rows_annotated == rows
    seconds = upload_seconds + last - submitted
    return Run(
        workers=workers,
        rows=rows,
        files=files,
        seconds=round(seconds, 2),
        rows_per_second=round(rows / seconds),
        upload_seconds=round(upload_seconds, 2),
        first_result_seconds=round(first or seconds, 2),
        state_seconds={state: round(spent, 2) for state, spent in states.items()},
        cpu_seconds={},
    )


def _uploaded(client: Client, rows: int, files: int) -> tuple[list[str], float]:
    """The ids of so many files of these rows, and the seconds that it took to send them."""
    ids, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for first, after in pairwise(rows * number // files for number in range(files + 1)):
            write_rows(path, after - first, first)
            spent, file = measurement.timed(lambda: client.files.upload(path))
            ids.append(file.id)
            seconds += spent
    return ids, seconds


def main() -> None:
    """Print a table and write benchmarks/results/jobs.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=1, help="files that the rows are in")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--merge", choices=get_args(Merge), default="auto", help="single files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, min(options.rows, LOOP_MOST_ROWS))
        loop = bare_loop(path)
    runs = []
    print(f"{options.rows:,} rows in {options.files} files; bare loop: {loop}", flush=True)
    print("workers  seconds   rows/s  first  x loop  states; CPU s; peak MB in 1st and 2nd half")
    for workers in options.workers:
        run = measure(options.rows, options.files, workers, options.merge)
        runs.append(run)
        ratio = loop["rows_per_second"] / run.rows_per_second
        print(
            f"{workers:7} {run.seconds:8.1f} {run.rows_per_second:8,}"
            f" {run.first_result_seconds:6.1f} {ratio:7.2f}"
            f"  {run.state_seconds}; {run.cpu_seconds}; {run.memory_mb}",
            flush=True,
        )
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": measurement.machine(
            ("cwpo-worker", "pyarrow", "rq", "pydantic"),
            memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
            load_average=os.getloadavg(),
        ),
        "bare_loop": loop,
        "runs": [asdict(run) for run in runs],
    }
    measurement.write(options.output, record, indent=1)


if __name__ == "__main__":
    main()
