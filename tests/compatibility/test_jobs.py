"""A data folder of 0.1: the jobs in it are listed, and the unfinished one is finished."""

import json

import pyarrow.parquet as pq
import pytest

from cwpo import Client
from cwpo.errors import ConflictError
from harness import Up

UNFINISHED, ENDED = "job-4dcf51e5c0a23c2c082841b6", "job-a2138ee5e51163ff053065f1"


@pytest.mark.slow
def test_an_unfinished_job_comes_to_what_it_would_have_come_to(old, tmp_path):
    parts = {path.name: path.stat().st_mtime_ns for path in parts_of(old)}
    assert sorted(parts) == ["00000.parquet", "00001.parquet"]
    running = Up(old / "up", "--backend", "null", "--workers", "1")
    try:
        with Client(running.url) as client:
            assert {job.id for job in client.jobs.list().jobs} == {UNFINISHED, ENDED}
            job = client.jobs.wait(UNFINISHED)
            # The one that had ended has no list of parts.
            with pytest.raises(ConflictError, match="download its results"):
                client.jobs.parts(ENDED)
            assert client.jobs.parts(UNFINISHED).rows == 119
            got = {name: downloaded(client, name, tmp_path) for name in (UNFINISHED, ENDED)}
            ended = client.jobs.get(ENDED)
    finally:
        running.close()
    assert (job.state, ended.state) == ("completed_with_errors", "completed_with_errors")
    assert job.progress.rows_annotated == ended.progress.rows_annotated == 119
    assert got[UNFINISHED] == got[ENDED]
    kept = old / "up" / "store" / "jobs" / ENDED / "results.jsonl"
    assert got[ENDED][0] == [json.loads(line) for line in kept.read_text().splitlines()]
    # What was done is not done again.
    assert {path.name: path.stat().st_mtime_ns for path in parts_of(old)}.items() >= parts.items()


def parts_of(old):
    return (old / "up" / "store" / "jobs" / UNFINISHED / "parts").glob("*.parquet")


def downloaded(client, job_id, folder):
    """Its dataset, the same in both formats, and its errors."""
    lines = client.jobs.download(job_id, folder / f"{job_id}.jsonl", format="jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    table = client.jobs.download(job_id, folder / f"{job_id}.parquet", format="parquet")
    assert pq.read_table(table).to_pylist() == rows
    errors = client.jobs.download_errors(job_id, folder / f"{job_id}.errors.jsonl")
    return rows, errors.read_text()
