"""Whole jobs: an upload in, the weighted dataset and the errors out."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo import Message, Triplet
from cwpo.types import JobRequest


@pytest.mark.slow
@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_rows_in_order_with_their_ids(open_house, encoded, format):
    rows = open_house.rows(5000)  # Three shards.
    job = open_house.wait(open_house.submit(encoded(rows, format), format))
    assert job.state == "completed", job.error
    assert job.progress.model_dump(include={"rows_total", "rows_done", "rows_annotated"}) == {
        "rows_total": 5000,
        "rows_done": 5000,
        "rows_annotated": 5000,
    }
    assert open_house.results(job.id) == open_house.expected(rows)
    assert open_house.errors(job.id) == []
    assert job.model.name == "null"
    assert job.created_at <= job.started_at <= job.finished_at


def submit_files(house, *files):
    """Submit a job for several files, each its bytes and its format."""
    file_ids = [house.upload(data, format) for data, format in files]
    request = JobRequest(file_ids=file_ids)
    return house.ledger.submit(request, owner=None, idempotency_key=None).id


def test_several_files_are_annotated_as_one(open_house, encoded):
    rows = open_house.rows(5000)
    bad = [*rows[1000:3000], {"prompt": "alone"}]
    files = [
        (encoded(rows[:1000], "jsonl"), "jsonl"),
        (b"", "jsonl"),
        (encoded(bad, "jsonl.gz"), "jsonl.gz"),
        (encoded(rows[3000:], "parquet"), "parquet"),
    ]
    job = open_house.wait(submit_files(open_house, *files))
    assert job.state == "completed_with_errors", job.error
    assert open_house.results(job.id) == open_house.expected(rows)
    assert [error["row"] for error in open_house.errors(job.id)] == [3001]


def test_rows_without_id_are_numbered_through_all_files(open_house):
    row = b'{"prompt": "p", "response_a": "a", "response_b": "b"}\n'
    job = open_house.wait(submit_files(open_house, (row * 2, "jsonl"), (row, "jsonl")))
    assert [row["id"] for row in open_house.results(job.id)] == ["1", "2", "3"]


def test_a_damaged_file_among_several_is_named(open_house, encoded):
    good = (encoded(open_house.rows(3), "jsonl"), "jsonl")
    job = open_house.wait(submit_files(open_house, good, (b"no parquet", "parquet")))
    assert job.state == "failed"
    assert f"{job.file_ids[1]}: not a readable Parquet file" in job.error


def test_the_prompts_of_all_files_are_of_one_kind(open_house, encoded):
    text = open_house.rows(3)
    chat = [{**row, "prompt": [{"role": "user", "content": "p"}]} for row in text]
    files = [(encoded(rows, "jsonl"), "jsonl") for rows in (text, chat)]
    job = open_house.wait(submit_files(open_house, *files))
    assert open_house.results(job.id) == open_house.expected(text)
    assert [error["row"] for error in open_house.errors(job.id)] == [4, 5, 6]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_extra_columns_have_one_type_in_all_shards(open_house, encoded, format):
    rows = open_house.rows(2100)  # Two shards.
    extras = [{"n": index, "tags": ["t", str(index)]} for index in range(2100)]
    if format == "jsonl":
        extras[2099] = {"n": 0.5, "tags": "none", "late": True}
    given = [row | extra for row, extra in zip(rows, extras, strict=True)]
    job = open_house.wait(open_house.submit(encoded(given, format), format))
    assert job.state == "completed", job.error
    with open_house.ledger.open_results(job.id, "jsonl", owner=None).stream as stream:
        got = [json.loads(line) for line in stream]
    names = ("n", "tags", "late") if format == "jsonl" else ("n", "tags")
    expected = [row | {name: None for name in names} for row in open_house.expected(rows)]
    assert got == [row | extra for row, extra in zip(expected, extras, strict=True)]
    with open_house.ledger.open_results(job.id, "parquet", owner=None).stream as stream:
        table = pq.read_table(stream)
    assert table.column("n").type == (pa.float64() if format == "jsonl" else pa.int64())
    assert table.column("tags")[0].as_py() == '["t", "0"]'


def test_a_row_whose_column_would_be_written_over_is_rejected_by_name(open_house):
    rows = open_house.rows(3)
    good = [rows[0], dict(rows[2])]
    rows[1]["score_chosen"] = 1.0
    job = open_house.wait(open_house.submit(rows))
    assert job.state == "completed_with_errors"
    assert open_house.results(job.id) == open_house.expected(good)
    (error,) = open_house.errors(job.id)
    assert (error["row"], error["code"]) == (2, "invalid_row")
    assert error["detail"].startswith("the column name 'score_chosen' is reserved")


def test_bad_rows_are_named_with_their_lines_and_the_others_are_unharmed(open_house):
    good = {"prompt": "p", "response_a": "a", "response_b": "b"}
    lines = [
        json.dumps(good),
        "{broken",
        "",
        json.dumps({**good, "response_b": "  "}),
        json.dumps({"prompt": "p"}),
        "[1]",
        json.dumps({**good, "id": 7, "prompt": "😀 ünï"}),
        '{"id": "\\ud800", "prompt": "\\ud800", "response_a": "a", "response_b": "b"}',
        json.dumps({**good, "prompt": [{"role": "user", "content": "hi"}]}),
    ]
    data = "\n".join(lines).encode() + b"\n\xff\xfe\n"
    job = open_house.wait(open_house.submit(data))
    assert job.state == "completed_with_errors", job.error
    assert [row["id"] for row in open_house.results(job.id)] == ["1", "7"]
    errors = open_house.errors(job.id)
    assert [error["row"] for error in errors] == [2, 4, 5, 6, 8, 9, 10]
    assert all(error["detail"] and error["code"] for error in errors)
    assert errors[1]["code"] == "empty_response"
    assert job.progress.rows_total == job.progress.rows_done == 9
    assert (job.progress.rows_annotated, job.progress.rows_failed) == (2, 7)


def test_rows_that_the_service_refuses_are_errors_with_their_lines(open_house, service):
    service.max_body_bytes = 20_000
    rows = open_house.rows(300)
    rows[41]["prompt"] = "long " * 5000
    rows[7] = rows[299] = {"prompt": "alone"}
    job = open_house.wait(open_house.submit(rows))
    assert job.state == "completed_with_errors", job.error
    errors = [(error["row"], error["id"], error["code"]) for error in open_house.errors(job.id)]
    assert errors == [
        (8, "8", "invalid_row"),
        (42, "row-41", "too_large"),
        (300, "300", "invalid_row"),
    ]
    good = [row for index, row in enumerate(rows) if index not in (7, 41, 299)]
    assert open_house.results(job.id) == open_house.expected(good)


def test_chat_prompts_give_chat_rows(open_house):
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi 😀"}]
    rows = [{"id": "c", "prompt": prompt, "response_a": "a", "response_b": "b"}]
    job = open_house.wait(open_house.submit(rows))
    (row,) = open_house.results(job.id)
    assert row["prompt"] == prompt
    assert sorted(turn["content"] for turn in row["chosen"] + row["rejected"]) == ["a", "b"]
    triplet = Triplet(id="c", prompt=[Message(**m) for m in prompt], response_a="a", response_b="b")
    (label,) = open_house.service.annotator.annotate([triplet])
    assert row["preferred"] == label.preferred


def test_a_job_without_a_single_good_row_completes_with_errors(open_house):
    job = open_house.wait(open_house.submit(b"nonsense\n"))
    assert (job.state, job.progress.rows_failed) == ("completed_with_errors", 1)
    assert open_house.results(job.id) == []
    assert len(open_house.errors(job.id)) == 1


@pytest.mark.parametrize(
    ("data", "format", "reason"),
    [
        (b"", "jsonl", "no rows"),
        (b"\n\n", "jsonl", "no rows"),
        (b"PAR1 or so", "parquet", "Parquet"),
        (gzip.compress(b'{"prompt": "p"}\n' * 99, mtime=0)[:-9], "jsonl.gz", "ends too early"),
    ],
)
def test_an_unreadable_input_fails_the_job_with_the_reason(open_house, data, format, reason):
    job = open_house.wait(open_house.submit(data, format))
    assert job.state == "failed"
    assert reason in job.error
    assert "\n" not in job.error


def test_real_preferences_come_back_row_for_row(open_house, data_dir):
    path = data_dir / "hhh_alignment.jsonl.gz"
    job = open_house.wait(open_house.submit(path.read_bytes(), "jsonl.gz"))
    assert job.state in ("completed", "completed_with_errors"), job.error
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    done = {row["id"]: row for row in open_house.results(job.id)}
    failed = {error["id"] for error in open_house.errors(job.id)}
    assert list(done) == [line["id"] for line in lines if line["id"] not in failed]
    assert len(done) + len(failed) == len(lines)
    for line in lines:
        if line["id"] in done:
            assert done[line["id"]]["prompt"] == line["prompt"]


@pytest.mark.parametrize(
    ("bad", "share", "state"),
    [
        (600, 0.5, "failed"),
        (500, 0.5, "completed_with_errors"),
        (1, 0.0, "failed"),
        (1000, 1.0, "completed_with_errors"),
    ],
)
def test_over_the_share_of_bad_rows_the_job_fails_early(open_house, bad, share, state):
    rows = open_house.rows(1000)
    for number in range(bad):
        rows[number] = {"prompt": "alone"}
    job = open_house.wait(open_house.submit(rows, max_rejected_share=share))
    assert job.state == state
    if state == "failed":
        assert f"{bad:,} of the first 1,000 rows are invalid" in job.error
        assert "the first is row 1: chosen is missing" in job.error
    else:
        assert len(open_house.errors(job.id)) == job.progress.rows_failed == bad


def test_a_few_rows_say_nothing_about_the_share_of_bad_ones(open_house):
    rows = [*open_house.rows(10), *[{"prompt": "alone"}] * 989]
    job = open_house.wait(open_house.submit(rows, max_rejected_share=0.0))
    assert (job.state, job.progress.rows_annotated) == ("completed_with_errors", 10)
