"""Inputs of this machine: which files there are, their rows, and what is uploaded for them."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo import Triplet
from cwpo.datasets.naming import TRIPLETS
from cwpo.datasets.sources import count_rows, rows_in, rows_through, source_files, uploads
from cwpo.errors import DatasetError

ROWS = [{"prompt": f"p{n}", "response_a": 'a, "b"\nc', "response_b": "ö"} for n in range(3)]
NAMES = {"prompt": "question", "response_a": "first", "response_b": "second"}
OTHERS = [{theirs: row[ours] for ours, theirs in NAMES.items()} for row in ROWS]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows, delimiter=","):
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


@pytest.fixture
def folder(tmp_path):
    """A file of each format, with the same rows, and one of no format."""
    (tmp_path / "1.jsonl").write_text(lines(ROWS))
    (tmp_path / "2.csv").write_text("\ufeff" + table(ROWS))
    (tmp_path / "3.tsv").write_text(table(ROWS, "\t"))
    (tmp_path / "4.csv.gz").write_bytes(gzip.compress(table(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "5.parquet")
    (tmp_path / "notes.txt").write_text("not triplets")
    return tmp_path


def test_rows_are_the_same_in_every_format(folder):
    files = source_files(folder)
    assert [path.name for path in files] == [
        "1.jsonl",
        "2.csv",
        "3.tsv",
        "4.csv.gz",
        "5.parquet",
    ]
    for path in files:
        assert list(rows_in(path)) == list(enumerate(ROWS, 1)), path
        assert count_rows([path]) == 3
    assert list(rows_through(files, TRIPLETS)) == list(enumerate(ROWS * 5, 1))
    assert [path.name for path in source_files(folder / "[1-3].*")] == ["1.jsonl", "2.csv", "3.tsv"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing.jsonl", "nothing.jsonl: no such file"),
        ("*.json", r"\*.json: no file has such a name"),
        ("empty", "empty: this folder holds no .jsonl, .jsonl.gz, .parquet, .csv or .tsv file"),
        ("notes.txt", "notes.txt: not a .jsonl, .jsonl.gz, .parquet, .csv or .tsv file"),
    ],
)
def test_an_input_that_is_none_is_named(folder, name, reason):
    (folder / "empty").mkdir()
    with pytest.raises(DatasetError, match=reason):
        source_files(folder / name)


def test_a_table_row_of_too_many_cells_is_rejected_and_others_stay(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response_a,response_b\np,a,b,c\np,a\np,a,b\n")
    too_long, short, whole = rows_in(path)
    assert too_long == (1, "the row has more cells than the 3 names above it")
    assert short == (2, {"prompt": "p", "response_a": "a"})
    assert whole == (3, {"prompt": "p", "response_a": "a", "response_b": "b"})


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", "prompt\np\nä".encode("latin-1"), "rows.csv: not UTF-8"),
        (
            "rows.csv.gz",
            gzip.compress(b"prompt\np\n" * 999, mtime=0)[:-20],
            "rows.csv.gz: the gzip data",
        ),
        ("rows.parquet", b"none", "rows.parquet: not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=reason):
        list(rows_in(path))


def written(source, columns=None):
    with uploads(source, TRIPLETS, columns) as paths:
        return [path.read_text() for path in paths]


def test_what_the_service_reads_is_uploaded_as_it_is_and_the_rest_as_json_lines(folder):
    with uploads(folder, TRIPLETS) as paths:
        assert paths[0] == folder / "1.jsonl"
        assert paths[4] == folder / "5.parquet"
        for path in paths[1:4]:
            assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    assert not paths[1].exists()
    assert written([folder / "1.jsonl", str(folder / "2.csv")])[0] == lines(ROWS)


def test_rows_in_memory_and_columns_of_other_names_are_written_with_those_that_are_needed(tmp_path):
    for source in (OTHERS, iter(OTHERS), pa.Table.from_pylist(OTHERS)):
        (text,) = written(source, NAMES)
        assert [json.loads(line) for line in text.splitlines()] == ROWS
    (text,) = written([Triplet(**ROWS[0])])
    assert json.loads(text) == ROWS[0]
    # Rows keep the numbers of their lines, and what is no row is rejected by the service.
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + lines(OTHERS[:1]) + "{no JSON\n\n" + lines(OTHERS[1:2]))
    (text,) = written(path, NAMES)
    first, second, third, fourth, fifth = text.split("\n")[:5]
    assert (first, fourth) == ("", "")
    assert [json.loads(second), json.loads(fifth)] == ROWS[:2]
    assert json.loads(third).startswith("not JSON")


def test_a_file_without_the_columns_is_named_before_anything_is_uploaded(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(OTHERS))
    with pytest.raises(
        DatasetError, match=r"rows\.jsonl: a row needs .*are question, first, second"
    ):
        written(path)
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"]}) + "\n")
    with pytest.raises(DatasetError, match=r"rows\.jsonl: the rows have lists .* --pairs"):
        written(path)
