"""Rows in every form in which Python has them."""

from pathlib import Path

import pandas
import polars
import pyarrow as pa
import pytest

from cwpo import Triplet
from cwpo.datasets.records import count, records
from cwpo.errors import DatasetError

ROWS = [{"prompt": f"question {n} ö", "n": n, "none": None} for n in range(3000)]


def forms():
    from datasets import Dataset

    table = pa.Table.from_pylist(ROWS)
    yield "list", ROWS
    yield "tuple", tuple(ROWS)
    yield "datasets", Dataset.from_list(ROWS)
    yield "arrow", table
    yield "arrow batch", table.combine_chunks().to_batches()[0]
    yield "polars", polars.DataFrame(ROWS)
    frame = pandas.DataFrame(ROWS)
    yield "pandas", frame
    yield "pandas with an index", frame.set_index("n", drop=False)


def test_rows_are_the_same_in_every_form():
    for name, rows in forms():
        assert count(rows) == 3000, name
        found = [{key: row[key] for key in ("prompt", "n", "none")} for row in records(rows)]
        assert found == ROWS, name


def test_rows_that_come_one_by_one_are_not_counted():
    for rows in (iter(ROWS), pa.Table.from_pylist(ROWS).to_reader(), (row for row in ROWS)):
        assert count(rows) is None
        assert list(records(rows)) == ROWS


def test_models_stay_what_they_are():
    triplet = Triplet(prompt="p", response_a="a", response_b="b")
    assert list(records([triplet])) == [triplet]


@pytest.mark.parametrize(
    ("rows", "fix"),
    [
        ({"train": [], "test": []}, r"the keys 'train', 'test' .* such as dataset\['train'\]"),
        ("rows.jsonl", "submit the file as a job"),
        (Path("rows.jsonl"), "submit the file as a job"),
        (polars.LazyFrame({"prompt": ["p"]}), r"a LazyFrame has no rows .*after collect\(\)"),
        (7, "a int has no rows to read"),
    ],
)
def test_what_has_no_rows_is_an_error_that_says_what_to_give(rows, fix):
    with pytest.raises(DatasetError, match=fix):
        records(rows)
