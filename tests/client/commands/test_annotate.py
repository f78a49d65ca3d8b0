"""`cwpo annotate`, by requests and by a job."""

import json

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest

from harness import TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize("job_above", [100, 0], ids=["by requests", "by a job"])
def test_annotate_gives_a_complete_result_and_the_rejected_rows(
    cwpo, messy, tmp_path, job_above, check_outputs
):
    output = tmp_path / "weighted.parquet"
    result = cwpo("annotate", messy, "-o", output, "--job-above", job_above)
    assert result.returncode == 0, result.stderr
    work = "annotate" if job_above else "job completed_with_errors"
    assert f"{work}: 7 of 7 rows" in result.stderr
    assert "4 of 7 rows rejected: 2 invalid_row, 1 empty_response, 1 too_long" in result.stderr
    assert "Keep those too_long with `--truncation prompt_left`" in result.stderr
    check_outputs(output)


@pytest.mark.slow
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


@pytest.mark.slow
def test_extra_columns_go_along_by_requests_and_by_a_job_alike(cwpo, good, tmp_path):
    extras = [{"source": "web", "tags": ["a", 1]}, {"n": 3, "tags": "none"}, {"source": None}]
    source = tmp_path / "triplets.jsonl"
    rows = [row | extra for row, extra in zip(good, extras, strict=True)]
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
def test_a_row_with_a_column_that_would_be_written_over_is_rejected(
    cwpo, good, tmp_path, job_above
):
    source, output = tmp_path / "triplets.jsonl", tmp_path / "weighted.jsonl"
    rows = [good[0], good[0] | {"confidence": 1}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cwpo("annotate", source, "-o", output, "--job-above", job_above)
    assert result.returncode == 0
    assert len(output.read_text().splitlines()) == 1
    (rejected,) = output.with_suffix(".errors.jsonl").read_text().splitlines()
    assert "the column name 'confidence' is reserved" in json.loads(rejected)["detail"]


def test_what_annotate_answers_is_what_post_annotate_answers(up, cwpo, good, messy, tmp_path):
    output = tmp_path / "weighted.jsonl"
    cwpo("annotate", messy, "-o", output)
    row = json.loads(output.read_text().splitlines()[0])
    answer = httpx2.post(f"{up}/annotate", json={"triplets": [good[0]]}, timeout=TIMEOUT)
    (label,) = answer.json()["annotations"]
    assert row["preferred"] == label["preferred"]
    assert row["confidence"] == pytest.approx(label["confidence"], abs=1e-5)


@pytest.mark.slow
def test_pairs_of_lists_are_the_same_by_requests_and_by_a_job(cwpo, good, tmp_path):
    source = tmp_path / "lists.jsonl"
    texts = ["because", "no", "because 🐈", "sorry"]
    lists = [
        {"id": f"list-{n}", "prompt": "why cat", "responses": texts[: 2 + n]} for n in range(3)
    ]
    rows = [*lists, {"id": "bad", "prompt": "why", "responses": ["no"]}, good[0]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = []
    for job_above in (100, 0):
        output = tmp_path / f"{job_above}.parquet"
        result = cwpo("annotate", source, "-o", output, "--pairs=all", "--job-above", job_above)
        assert result.returncode == 0, result.stderr
        assert "11 pairs of 4 rows" in result.stderr
        assert "1 of 5 rows rejected: 1 invalid_row" in result.stderr
        written.append(pq.read_table(output).to_pylist())
    by_requests, by_job = written
    names = ("confidence", "score_chosen", "score_rejected")
    for one, other in zip(by_requests, by_job, strict=True):
        close = {name: pytest.approx(other[name], abs=1e-5) for name in names}
        assert one == other | close
    assert [row["prompt_pairs"] for row in by_job] == [1, 3, 3, 3, 6, 6, 6, 6, 6, 6, 1]
    job_id = json.loads(cwpo("jobs", "list", "--json", "--limit=1").stdout)["id"]
    shown = cwpo("jobs", "show", job_id).stdout
    assert "5 of 5 rows  11 pairs  1 rejected" in shown
    refused = cwpo("jobs", "submit", source, "--pairs=some")
    assert refused.returncode == 1
    assert "best_worst" in refused.stderr
