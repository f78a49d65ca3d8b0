"""examples/ray/annotate.py on a real Ray gives the dataset that a batch job gives."""

import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo import Client
from cwpo.datasets.folder import dataset_files
from harness import furnished

PYTHON = os.environ.pop("CWPO_RAY_PYTHON", None)
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="CWPO_RAY_PYTHON is not set: make test-ray"),
]


@pytest.fixture
def house(tmp_path):
    with furnished(tmp_path) as house:
        yield house


@pytest.fixture
def inputs(house, tmp_path):
    """A folder of three files with extra columns and some rows that cannot be annotated."""
    folder = tmp_path / "triplets"
    folder.mkdir()
    rows = house.rows(7000)
    for number, row in enumerate(rows):
        row["source"] = "web" if number % 2 else None
        row["score"] = number if number < 3000 else number / 2
    rows[10] = {"prompt": "alone"}
    rows[5000]["response_a"] = " "
    del rows[6000]["id"]
    for name, part in (("a.jsonl", rows[:3000]), ("b.jsonl", rows[3000:5500])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part) + "\n")
    pq.write_table(pa.Table.from_pylist(rows[5500:]), folder / "c.parquet")
    return folder


def annotate(inputs, output, annotator="null"):
    command = [PYTHON, "examples/ray/annotate.py", inputs, "--annotator", annotator]
    return subprocess.run(
        [*command, "--output", output, "--actors", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def rows_of(folder):
    return pa.concat_tables(map(pq.read_table, dataset_files(folder))).to_pylist()


def test_the_dataset_is_that_of_a_job(house, inputs, tmp_path):
    with Client(house.url) as client:
        files = [client.files.upload(path).id for path in sorted(inputs.iterdir())]
        job = client.jobs.create(file_ids=files)
        house.work()
        client.jobs.download_parts(job.id, tmp_path / "job")
        errors = client.jobs.download_errors(job.id, tmp_path / "errors.jsonl")
    output = tmp_path / "ray"
    done = annotate(inputs, output)
    assert done.returncode == 0, done.stderr
    expected = rows_of(tmp_path / "job")
    assert len(expected) == 6998
    assert rows_of(output) == expected
    assert (output / "errors.jsonl").read_text() == errors.read_text()

    # Repeated after an interruption, it writes what is missing, and leaves the rest.
    parts = sorted(output.glob("*.parquet"))
    written = {path: path.stat().st_mtime_ns for path in parts[1:]}
    parts[0].unlink()
    (output / "dataset.json").unlink()
    again = annotate(inputs, output)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert rows_of(output) == expected


def test_parts_of_another_input_are_not_mixed_in(inputs, tmp_path):
    output = tmp_path / "ray"
    assert annotate(inputs / "a.jsonl", output).returncode == 0
    other = annotate(inputs / "c.parquet", output)
    assert other.returncode == 1
    assert "does not belong to this dataset: name a new folder" in other.stderr
