"""`cwpo annotate` and `cwpo jobs` against a real `cwpo up` with a real, small annotator."""

import json
import os
import subprocess
import sys

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from cwpo import Triplet
from cwpo.process import free_port
from cwpo_annotator import Annotator

GOOD = [
    {"id": "x1", "prompt": "why cat", "response_a": "because 🐈", "response_b": "no"},
    {"id": 7, "prompt": "thanks", "response_a": "please", "response_b": "sorry " * 9},
    {"prompt": "the word", "chosen": "same", "rejected": "same"},
]
LINES = [
    json.dumps(GOOD[0]),
    "{not json",
    json.dumps({"id": "empty", "prompt": "p", "response_a": " ", "response_b": "b"}),
    json.dumps(GOOD[1], ensure_ascii=False),
    json.dumps({"id": "long", "prompt": "cat " * 500, "response_a": "a", "response_b": "b"}),
    json.dumps({"id": "half", "prompt": "p"}),
    json.dumps(GOOD[2]),
]
REASONS = [
    (2, None, "invalid_row"),
    (3, "empty", "empty_response"),
    (5, "long", "too_long"),
    (6, "half", "invalid_row"),
]


@pytest.fixture(scope="module")
def up(tiny_annotator, tmp_path_factory):
    """The url of a `cwpo up`; SIGTERM ends it with exit code 0."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "cwpo", "up", "--annotator", str(tiny_annotator)]
    command += ["--port", str(port), "--workers", "1", "--device", "cpu"]
    command += ["--data-dir", str(tmp_path_factory.mktemp("up"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert url in process.stdout.readline()
    yield url
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture
def cwpo(up):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "cwpo", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "CWPO_URL": up},
        )

    return run


@pytest.fixture
def messy(tmp_path):
    path = tmp_path / "triplets.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def check_outputs(output, tiny_annotator):
    rows = pq.read_table(output).to_pylist()
    assert [row["id"] for row in rows] == ["x1", "7", "7"]
    names = ("prompt", "response_a", "response_b")
    triplets = [Triplet(**{name: good[name] for name in names}) for good in GOOD[:2]]
    for row, label in zip(rows, Annotator.load(tiny_annotator).annotate(triplets), strict=False):
        scores = sorted((label.score_a, label.score_b), reverse=True)
        np.testing.assert_allclose([row["score_chosen"], row["score_rejected"]], scores, atol=1e-4)
        assert row["confidence"] == pytest.approx(np.tanh((scores[0] - scores[1]) / 2), abs=1e-4)
    assert rows[2]["preferred"] == "tie"
    lines = output.with_suffix(".errors.jsonl").read_text().splitlines()
    errors = [json.loads(line) for line in lines]
    assert [(error["row"], error["id"], error["code"]) for error in errors] == REASONS
    assert all(error["detail"] for error in errors)


@pytest.mark.parametrize("job_above", [100, 0], ids=["by requests", "by a job"])
def test_annotate_gives_a_complete_result_and_the_rejected_rows(
    cwpo, messy, tmp_path, job_above, tiny_annotator
):
    output = tmp_path / "weighted.parquet"
    result = cwpo("annotate", messy, "-o", output, "--job-above", job_above)
    assert result.returncode == 0, result.stderr
    assert "4 rows rejected" in result.stderr
    check_outputs(output, tiny_annotator)


def test_jsonl_and_parquet_outputs_hold_the_same_rows(cwpo, messy, tmp_path):
    outputs = [tmp_path / "weighted.parquet", tmp_path / "weighted.jsonl"]
    for output in outputs:
        assert cwpo("annotate", messy, "-o", output).returncode == 0
    lines = [json.loads(line) for line in outputs[1].read_text().splitlines()]
    table = pq.read_table(outputs[0]).to_pylist()
    assert [line["id"] for line in lines] == [row["id"] for row in table]
    np.testing.assert_allclose(
        [line["confidence"] for line in lines], [row["confidence"] for row in table], atol=1e-6
    )


def test_extra_columns_go_along_by_requests_and_by_a_job_alike(cwpo, tmp_path):
    extras = [{"source": "web", "tags": ["a", 1]}, {"n": 3, "tags": "none"}, {"source": None}]
    source = tmp_path / "triplets.jsonl"
    rows = [good | extra for good, extra in zip(GOOD, extras, strict=True)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for job_above in (100, 0):
        lines, table = tmp_path / f"{job_above}.jsonl", tmp_path / f"{job_above}.parquet"
        for output in (lines, table):
            result = cwpo("annotate", source, "-o", output, "--job-above", job_above)
            assert result.returncode == 0, result.stderr
        names = ("source", "tags", "n")
        got = [json.loads(line) for line in lines.read_text().splitlines()]
        expected = [{name: extra.get(name) for name in names} for extra in extras]
        assert [{name: row[name] for name in names} for row in got] == expected
        columns = pq.read_table(table).select(names).to_pydict()
        assert columns == {
            "source": ["web", None, None],
            "tags": ['["a", 1]', '"none"', None],
            "n": [None, 3, None],
        }


@pytest.mark.parametrize("job_above", [100, 0], ids=["by requests", "by a job"])
def test_a_column_that_would_be_written_over_is_refused(cwpo, tmp_path, job_above):
    source, output = tmp_path / "triplets.jsonl", tmp_path / "weighted.parquet"
    source.write_text(json.dumps(GOOD[0] | {"confidence": 1}) + "\n")
    result = cwpo("annotate", source, "-o", output, "--job-above", job_above)
    assert result.returncode == 1
    assert "row 1: the column 'confidence' has a name" in result.stderr.splitlines()[-1]
    assert not output.exists()


def test_a_job_from_submit_to_download(cwpo, messy, tmp_path, tiny_annotator):
    submitted = json.loads(cwpo("jobs", "submit", messy, "--json").stdout)
    job_id = submitted["id"]
    assert submitted["state"] in ("validating", "queued", "running")
    assert "completed_with_errors" in cwpo("jobs", "watch", job_id).stdout
    shown = json.loads(cwpo("jobs", "show", job_id, "--json").stdout)
    assert shown["progress"]["rows_total"] == len(LINES)
    assert (shown["progress"]["rows_annotated"], shown["progress"]["rows_failed"]) == (3, 4)
    listed = [json.loads(line) for line in cwpo("jobs", "list", "--json").stdout.splitlines()]
    assert job_id in [job["id"] for job in listed]
    output = tmp_path / "downloaded.parquet"
    assert cwpo("jobs", "download", job_id, "-o", output).returncode == 0
    check_outputs(output, tiny_annotator)
    too_late = cwpo("jobs", "cancel", job_id)
    assert too_late.returncode == 1
    assert "can no longer be cancelled" in too_late.stderr
    assert cwpo("jobs", "delete", job_id).stdout == f"{job_id}  deleted\n"
    assert "404" in cwpo("jobs", "show", job_id).stderr


def test_an_input_on_the_service_s_side_is_not_looked_for_here(cwpo):
    result = cwpo("jobs", "submit", "2026/rows.jsonl", "--on-server")
    assert result.returncode == 1
    assert "its operator has set no --input-prefix" in result.stderr


def test_a_job_that_fails_says_why_and_leaves_no_output(cwpo, tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet at all")
    output = tmp_path / "weighted.parquet"
    result = cwpo("jobs", "submit", broken, "-o", output)
    assert result.returncode == 1
    assert "not a readable Parquet file" in result.stderr.splitlines()[-1]
    assert not output.exists()


def test_what_annotate_answers_is_what_post_annotate_answers(up, cwpo, messy, tmp_path):
    output = tmp_path / "weighted.jsonl"
    cwpo("annotate", messy, "-o", output)
    row = json.loads(output.read_text().splitlines()[0])
    (label,) = httpx.post(f"{up}/annotate", json={"triplets": [GOOD[0]]}).json()["annotations"]
    assert row["preferred"] == label["preferred"]
    assert row["confidence"] == pytest.approx(label["confidence"], abs=1e-5)
