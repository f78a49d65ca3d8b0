"""Parquet rows, read by bytes: equal to what pyarrow reads, within a memory that is bounded."""

import io
import os
import random
import subprocess
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.datasets import parquet

CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def table(rng, rows):
    """Columns of every nesting that people store texts in, some cells null, some alike."""

    def text(row):
        return rng.choice([None, "", "same", f"{row} " * rng.randint(0, 200)])

    def turns(row):
        return [{"role": "user", "content": text(row)}] * rng.randint(0, 3)

    return pa.table(
        {
            "prompt": pa.array([rng.choice([None, turns(row)]) for row in range(rows)], CHAT),
            "text": pa.array(map(text, range(rows)), rng.choice([pa.string(), pa.large_string()])),
            "view": pa.array(map(text, range(rows)), pa.string_view()),
            "number": pa.array(range(rows), pa.int64()),
            "nothing": pa.nulls(rows),
            "lists": pa.array([[[text(row)], []] for row in range(rows)]),
            "fixed": pa.array([["a", "b"]] * rows, pa.list_(pa.string(), 2)),
            "map": pa.array([[("k", "v")]] * rows, pa.map_(pa.string(), pa.string())),
        }
    )


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_that_pyarrow_reads_however_the_file_was_written(seed):
    rng = random.Random(seed)
    sink = io.BytesIO()
    pq.write_table(
        table(rng, rng.choice([1, 700, 2500])),
        sink,
        row_group_size=rng.choice([100, 1000, 5000]),
        compression=rng.choice(["zstd", "snappy", "none"]),
        use_dictionary=rng.choice([True, False, ["text"]]),
        data_page_size=rng.choice([1000, 1 << 20]),
        dictionary_pagesize_limit=rng.choice([1000, 1 << 20]),
        data_page_version=rng.choice(["1.0", "2.0"]),
    )
    found = list(parquet.read_rows(io.BytesIO(sink.getvalue()), longest=1 << 20))
    assert found == pq.read_table(io.BytesIO(sink.getvalue())).to_pylist()


def test_a_row_over_the_limit_is_told_apart_and_the_others_are_read():
    rows = [{"prompt": "p", "n": n, "chat": [{"content": "x" * n}]} for n in (5, 500, 7)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    first, long, last = parquet.read_rows(io.BytesIO(sink.getvalue()), longest=100)
    assert (first, last) == (rows[0], rows[2])
    assert long == "the row is longer than 100 bytes"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded by Linux's limit")
def test_cells_that_repeat_take_no_more_memory_than_a_few_rows(tmp_path):
    path = tmp_path / "repeated.parquet"
    chat = [{"role": "user", "content": "x" * 400_000}]
    rows = {"prompt": pa.array([chat] * 2000, CHAT), "text": ["a" * 400_000] * 2000}
    pq.write_table(pa.table(rows), path, compression="zstd")
    assert path.stat().st_size < 5000  # Which hold 1.6 GB of text.
    script = f"""
        import resource
        from cwpo.datasets import parquet
        held = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
        most = int(held.split()[1]) * 1024 + (400 << 20) + {os.cpu_count()} * (16 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        with open({str(path)!r}, "rb") as file:
            print(sum(len(row["text"]) for row in parquet.read_rows(file, longest=1 << 20)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    read = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(read.stdout) == 2000 * 400_000
