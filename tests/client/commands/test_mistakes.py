"""What a stranger does wrong first: each answer is one line that names the fix, and exit code 1."""

import json

import pyarrow.parquet as pq
import pytest

from cwpo import Client
from cwpo.cli import run
from cwpo.commands.annotate import Annotate
from cwpo.commands.batch_jobs import Submit
from cwpo.errors import ModelRevisionError
from harness import House, furnished, serving

ROWS = House.rows(3)
NAMES = {"question": "prompt", "answer_1": "response_a", "answer_2": "response_b"}
OTHERS = [{theirs: row[ours] for theirs, ours in NAMES.items()} for row in ROWS]
COLUMNS = "prompt=question,response_a=answer_1,response_b=answer_2"


@pytest.fixture(scope="module")
def url():
    with serving() as service:
        yield service.url


@pytest.fixture
def annotate(url, monkeypatch, capsys):
    """`annotate(*arguments)`: the exit code of `cwpo annotate`, and its last line."""
    monkeypatch.setenv("CWPO_URL", url)

    def call(*arguments, command=Annotate):
        try:
            run(command, [str(argument) for argument in arguments], "cwpo annotate")
        except SystemExit as ending:
            return 1, str(ending.code)
        return 0, capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.fixture
def file(tmp_path):
    """`file(rows, name=)`: a file of JSON lines."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_wrong_columns_stop_at_once_and_the_flag_that_maps_them_works(annotate, file, tmp_path):
    source, output = file(OTHERS), tmp_path / "weighted.parquet"
    code, line = annotate(source, "-o", output)
    assert code == 1
    assert "rows.jsonl: a row needs the columns prompt, response_a, response_b or " in line
    assert "the columns are question, answer_1, answer_2. Say which is which: --columns " in line
    assert not output.exists()
    assert annotate(source, "-o", output, "--columns", COLUMNS) == (0, f"{output}: 3 rows")
    texts = [
        (row["prompt"], {row["chosen"], row["rejected"]})
        for row in pq.read_table(output).to_pylist()
    ]
    assert texts == [(row["prompt"], {row["response_a"], row["response_b"]}) for row in ROWS]


def test_a_column_that_is_misspelt_is_named(annotate, file, tmp_path):
    arguments = (file(OTHERS), "-o", tmp_path / "weighted.jsonl", "--columns")
    code, line = annotate(*arguments, COLUMNS.replace("question", "qestion"))
    assert (code, "there is no column 'qestion': the columns are question," in line) == (1, True)
    code, line = annotate(*arguments, "promt=question")
    assert (code, "'promt' is no column that a row needs" in line) == (1, True)
    code, line = annotate(*arguments, "question")
    assert (code, "'question' is no NAME=COLUMN" in line) == (1, True)


def test_a_folder_without_data_and_a_file_that_is_not_there_are_named(annotate, tmp_path):
    output = tmp_path / "weighted.jsonl"
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("folder", "this folder holds no .jsonl, .jsonl.gz, .parquet, .csv or .tsv file"),
        ("rows.jsonl", "no such file"),
        ("*.csv", "no file has such a name"),
    ):
        code, line = annotate(tmp_path / name, "-o", output)
        assert (code, line) == (1, f"cwpo annotate: {tmp_path / name}: {reason}")


def test_tables_folders_and_patterns_are_annotated(annotate, file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    names = ("prompt", "response_a", "response_b")
    for number, row in enumerate(ROWS):
        cells = ",".join(row[name] for name in names)
        (folder / f"{number}.csv").write_text(f"{','.join(names)}\n{cells}\n")
    for source in (folder, folder / "*.csv"):
        output = tmp_path / "weighted.jsonl"
        assert annotate(source, "-o", output) == (0, f"{output}: 3 rows")
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(row["id"], row["prompt"]) for row in rows] == [
            (str(number), row["prompt"]) for number, row in enumerate(ROWS, 1)
        ]


def test_a_run_that_labels_nothing_fails_with_the_first_reason(annotate, file, tmp_path):
    output = tmp_path / "weighted.jsonl"
    bad = [{**row, "response_a": " "} for row in ROWS]
    code, line = annotate(file(bad), "-o", output)
    assert (code, line) == (1, "cwpo annotate: nothing was annotated: row 1: response_a is empty")
    assert len((tmp_path / "weighted.errors.jsonl").read_text().splitlines()) == 3
    code, line = annotate(file([]), "-o", output)
    assert (code, line) == (1, "cwpo annotate: nothing was annotated: the input has no rows")
    code, line = annotate(file([*bad, ROWS[0]]), "-o", output)
    assert code == 0


def test_a_row_that_is_too_large_for_a_request_is_counted_without_a_flag_that_would_not_help(
    annotate, file, tmp_path
):
    output = tmp_path / "weighted.jsonl"
    long = {**ROWS[0], "prompt": "a" * 3000}
    with serving(max_body_bytes=2000) as service:
        code, line = annotate(file([long, *ROWS]), "-o", output, "--url", service.url)
    assert code == 0
    assert "1 of 4 rows rejected: 1 too_large; see " in line
    assert "--truncation" not in line
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_service_that_is_down_says_how_to_start_one(annotate, file, monkeypatch, tmp_path):
    monkeypatch.setenv("CWPO_URL", "http://127.0.0.1:9")
    code, line = annotate(file(ROWS), "-o", tmp_path / "weighted.jsonl")
    assert code == 1
    assert "no answer from http://127.0.0.1:9" in line
    assert "Start one with `cwpo up`, or set --url or CWPO_URL" in line


def test_another_revision_says_which_one_there_is(url):
    with (
        Client(url, max_retries=0) as client,
        pytest.raises(ModelRevisionError, match=r"at revision null,.* leave the revision out"),
    ):
        client.annotate(ROWS, revision="older")


@pytest.mark.slow
def test_a_job_that_labels_nothing_fails_and_says_how_to_get_the_reasons(
    annotate, file, tmp_path, monkeypatch
):
    bad = [{**row, "response_a": " "} for row in ROWS]
    with furnished(tmp_path / "house") as house:
        worker = house.start_worker()
        monkeypatch.setenv("CWPO_URL", house.url)
        code, line = annotate(file(bad), "--wait", command=Submit)
        assert code == 1
        assert "annotated none of its 3 rows: `cwpo jobs download job-" in line
        output = tmp_path / "weighted.jsonl"
        code, line = annotate(file(bad), "-o", output, command=Submit)
        assert (code, "nothing was annotated: row 1: response_a is empty" in line) == (1, True)
        columns = ("--columns", COLUMNS)
        code, line = annotate(file(OTHERS), "-o", output, *columns, command=Submit)
        assert (code, line) == (0, f"{output}: 3 rows")
        house.kill(worker)
    code, line = annotate("rows.jsonl", "--on-server", "--columns", "prompt=p", command=Submit)
    assert (code, "cannot be renamed" in line) == (1, True)
