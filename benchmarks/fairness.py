"""How long a job of one shard takes beside a job of 10,000 shards, against its time alone.

Both are annotated by `cwpo up` with the null annotator. The large job is made without its plan,
which would read 20 million rows: its shards are one file under 10,000 names.

Example:
    python benchmarks/fairness.py --workers 1 2
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import jobs
import measurement
import redis
import servers

from cwpo import Client
from cwpo.types import FINAL_STATES
from cwpo_worker import ids
from cwpo_worker.jobs.ledger import SHARD_ROWS
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.manifest import JobFolder, Manifest
from cwpo_worker.jobs.record import JobRecord, now
from cwpo_worker.storage.store import BlobStore

RESULTS = measurement.RESULTS / "fairness.json"
SHARDS = 10_000
# Until the workers are busy with the large job.
WARM_SHARDS = 20


@dataclass
class Comparison:
    """Median seconds of a job of one shard, from its submission to its last state."""

    workers: int
    alone_seconds: float
    beside_seconds: float
    ratio: float


def compare(path: Path, workers: int, repeats: int) -> Comparison:
    """The small job alone, and beside the large one."""
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
        servers.up(folder, "--backend", "null", "--workers", str(workers)) as (url, _),
        Client(url) as client,
    ):
        file_id = client.files.upload(path).id
        _seconds(client, file_id)  # The first requests of a service are slower.
        alone = median(_seconds(client, file_id) for _ in range(repeats))
        with _large_job(Path(folder), client, file_id):
            beside = median(_seconds(client, file_id) for _ in range(repeats))
    return Comparison(workers, round(alone, 3), round(beside, 3), round(beside / alone, 2))


def _seconds(client: Client, file_id: str) -> float:
    begun = time.monotonic()
    job = client.jobs.create(file_id)
    while job.state not in FINAL_STATES:
        time.sleep(0.01)
        job = client.jobs.get(job.id)
    assert job.state == "completed", job
    return time.monotonic() - begun


@contextmanager
def _large_job(folder: Path, client: Client, file_id: str) -> Iterator[None]:
    """A job of SHARDS shards that is being annotated until the block ends."""
    store = BlobStore(str(folder / "store"))
    like = JobFolder(client.jobs.list(limit=1).jobs[0].id)
    record = JobRecord(
        id=ids.make("job", None, None),
        state="validating",
        file_id=file_id,
        created_at=now(),
        shard_rows=SHARD_ROWS,
    )
    job_folder = JobFolder(record.id)
    for index in range(SHARDS):
        link = folder / "store" / job_folder.shard(index)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(folder / "store" / like.shard(0))
    with store.create(job_folder.rejected):
        pass
    manifest = Manifest(
        job_id=record.id,
        input_sha256="",
        truncation="error",
        rows=SHARDS * SHARD_ROWS,
        rejected=0,
        shards=[(0, SHARDS)],
    )
    with store.create(job_folder.manifest) as blob:
        blob.write(manifest.model_dump_json().encode())
    lifecycle = Lifecycle(redis.Redis.from_url(_redis_url(folder)), store)
    lifecycle.registry.create(record)
    lifecycle.note_planned(manifest)
    while lifecycle.finished.count(record.id) < WARM_SHARDS:
        time.sleep(0.1)
    yield
    assert client.jobs.cancel(record.id).progress.rows_done < SHARDS * SHARD_ROWS


def _redis_url(folder: Path) -> str:
    """Where the Valkey of `cwpo up` over this folder listens."""
    lines = (folder / "valkey" / "valkey.conf").read_text().splitlines()
    settings = dict(line.split(" ", 1) for line in lines)
    return f"redis://:{settings['requirepass']}@127.0.0.1:{settings['port']}/0"


def main() -> None:
    """Print a table and write benchmarks/results/fairness.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        jobs.write_rows(path, SHARD_ROWS)
        print(f"workers  alone s  beside {SHARDS:,} shards  ratio")
        for workers in options.workers:
            found = compare(path, workers, options.repeats)
            comparisons.append(asdict(found))
            print(
                f"{workers:7} {found.alone_seconds:8.2f} {found.beside_seconds:21.2f}"
                f" {found.ratio:6.2f}",
                flush=True,
            )
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": measurement.machine(("cwpo-worker", "rq"), load_average=os.getloadavg()),
        "shards": SHARDS,
        "repeats": options.repeats,
        "comparisons": comparisons,
    }
    measurement.write(options.output, record, indent=1)


if __name__ == "__main__":
    main()
