"""What a job of 500,000 shards, a billion rows, costs Redis, its status and the reconciler.

Example:
    python benchmarks/ledger.py --shards 500000
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import measurement
import redis
import servers

from cwpo import Client
from cwpo.types import JobProgress
from cwpo_worker import ids
from cwpo_worker.jobs.finished_shards import RowCounts
from cwpo_worker.jobs.ledger import SHARD_ROWS, Ledger
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.record import JobRecord, now
from cwpo_worker.queue.valkey import EmbeddedValkey
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import FileCatalog
from cwpo_worker.upkeep.reconciler import Reconciler

RESULTS = measurement.RESULTS / "ledger.json"
# The others are left: a job is slowest to look after shortly before it ends.
LEFT_SHARDS = 1000


def main() -> None:
    """Print the figures and write benchmarks/results/ledger.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as valkey:
        figures = measure(Path(folder), valkey.url, options.shards, options.repeats)
    print(", ".join(f"{name}: {value:,}" for name, value in figures.items()))
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": measurement.machine(("cwpo-worker", "redis"), load_average=os.getloadavg()),
        "shards": options.shards,
        "rows": options.shards * SHARD_ROWS,
        "repeats": options.repeats,
        **figures,
    }
    measurement.write(options.output, record, indent=1)


def measure(folder: Path, url: str, shards: int, repeats: int) -> dict[str, float]:
    """Medians of a status by HTTP and of a round of the reconciler, and the memory of Redis."""
    connection = redis.Redis.from_url(url)
    store = BlobStore(str(folder / "store"))
    lifecycle = Lifecycle(connection, store)
    ledger = Ledger(connection, store, lifecycle, FileCatalog(store))
    reconciler = Reconciler(connection, store, lifecycle, ledger)
    job_id = _almost_finished(lifecycle, shards)
    serve = ("-m", "cwpo", "serve", "--backend", "null", "--port", "PORT")
    with servers.server(*serve, "--redis-url", url, "--store-url", store.url) as (port, _):
        client = Client(f"http://127.0.0.1:{port}")
        status = _milliseconds(lambda: client.jobs.get(job_id), repeats)
        assert client.jobs.get(job_id).progress.rows_done == (shards - LEFT_SHARDS) * SHARD_ROWS
    return {
        "status_ms": status,
        "reconcile_ms": _milliseconds(reconciler.reconcile, repeats),
        "redis_mib": round(int(connection.info("memory")["used_memory_peak"]) / 2**20, 1),
    }


def _almost_finished(lifecycle: Lifecycle, shards: int) -> str:
    """A job of so many shards, of which few are left."""
    record = JobRecord(
        id=ids.make("job", None, None),
        state="running",
        created_at=now(),
        started_at=now(),
        shard_rows=SHARD_ROWS,
        shards=shards,
        progress=JobProgress(rows_total=shards * SHARD_ROWS),
    )
    lifecycle.registry.create(record)
    for index in range(shards - LEFT_SHARDS):
        lifecycle.finished.add(record.id, index, RowCounts(SHARD_ROWS - 1, 1, SHARD_ROWS - 1))
    return record.id


def _milliseconds(work: Callable[[], object], repeats: int) -> float:
    return round(median(measurement.timed(work)[0] for _ in range(repeats)) * 1000, 2)


if __name__ == "__main__":
    main()
