"""`cwpo jobs`."""

import json

import pyarrow.parquet as pq
import pytest


@pytest.mark.slow
def test_a_job_from_submit_to_download(cwpo, messy, tmp_path, check_outputs):
    priority = ("--priority", "interactive")
    submitted = json.loads(cwpo("jobs", "submit", messy, *priority, "--json").stdout)
    job_id = submitted["id"]
    assert submitted["priority"] == "interactive"
    assert submitted["state"] in ("validating", "queued", "running")
    assert "completed_with_errors" in cwpo("jobs", "watch", job_id).stdout
    shown = json.loads(cwpo("jobs", "show", job_id, "--json").stdout)
    assert shown["progress"]["rows_total"] == 7
    assert (shown["progress"]["rows_annotated"], shown["progress"]["rows_failed"]) == (3, 4)
    listed = [json.loads(line) for line in cwpo("jobs", "list", "--json").stdout.splitlines()]
    assert job_id in [job["id"] for job in listed]
    output = tmp_path / "downloaded.parquet"
    downloaded = cwpo("jobs", "download", job_id, "-o", output)
    assert downloaded.returncode == 0
    assert "4 of 7 rows rejected: 2 invalid_row" in downloaded.stderr
    check_outputs(output)
    too_late = cwpo("jobs", "cancel", job_id)
    assert too_late.returncode == 1
    assert "can no longer be cancelled" in too_late.stderr
    assert cwpo("jobs", "delete", job_id).stdout == f"{job_id}  deleted\n"
    assert "404" in cwpo("jobs", "show", job_id).stderr


def objects(result):
    """The objects of JSON on standard output, where nothing else may be."""
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_jobs_are_listed_in_pages_that_follow_one_another(cwpo, messy):
    job_ids = [json.loads(cwpo("jobs", "submit", messy, "--json").stdout)["id"] for _ in range(3)]
    first = cwpo("jobs", "list", "--limit=2", "--json")
    assert [job["id"] for job in objects(first)] == [job_ids[2], job_ids[1]]
    assert "There are more: add --cursor " in first.stderr
    cursor = first.stderr.split()[-1]
    second = cwpo("jobs", "list", "--limit=1", "--json", "--cursor", cursor)
    assert [job["id"] for job in objects(second)] == [job_ids[0]]
    listed = cwpo("jobs", "list", "--all", "--json")
    assert [job["id"] for job in objects(listed)][:3] == job_ids[::-1]
    assert listed.stderr == ""
    table = cwpo("jobs", "list", "--all").stdout
    assert all(job_id in table for job_id in job_ids)
    refused = cwpo("jobs", "list", "--all", "--cursor", cursor)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "leave out --cursor" in refused.stderr
    wrong = cwpo("jobs", "list", "--cursor", "elsewhere")
    assert (wrong.returncode, "next_cursor" in wrong.stderr) == (1, True)


@pytest.mark.slow
def test_json_is_alone_on_standard_output(cwpo, messy, tmp_path):
    output = tmp_path / "weighted.parquet"
    expected = {
        "output": str(output),
        "rows": 3,
        "pairs": None,
        "rejected": {"invalid_row": 2, "empty_response": 1, "too_long": 1},
        "errors": str(tmp_path / "weighted.errors.jsonl"),
    }
    for how in ("--job-above=100", "--job-above=0"):
        annotated = cwpo("annotate", messy, "-o", output, "--json", how)
        assert json.loads(annotated.stdout) == expected
        assert "7 of 7 rows" in annotated.stderr
    submitted = cwpo("jobs", "submit", messy, "--wait", "--json")
    job_id = json.loads(submitted.stdout)["id"]
    assert "7 of 7 rows" in submitted.stderr
    assert json.loads(cwpo("jobs", "watch", job_id, "--json").stdout)["id"] == job_id
    downloaded = cwpo("jobs", "download", job_id, "-o", output, "--json")
    assert json.loads(downloaded.stdout) == expected
    assert json.loads(cwpo("jobs", "delete", job_id, "--json").stdout)["id"] == job_id


def test_json_of_a_job_that_failed_says_why_and_the_exit_code_that_it_did(cwpo, tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet at all")
    result = cwpo("jobs", "submit", broken, "--wait", "--json")
    if result.stdout:
        job = json.loads(result.stdout)
        assert job["state"] == "failed"
        assert job["error"] in result.stderr
    assert result.returncode == 1


def test_only_the_variable_with_the_prefix_asks_for_json(cwpo, monkeypatch):
    monkeypatch.setenv("JSON", "nonsense")
    assert cwpo("jobs", "list").returncode == 0
    monkeypatch.setenv("CWPO_JSON", "true")
    listed = cwpo("jobs", "list", "--limit=1")
    assert all(json.loads(line)["id"] for line in listed.stdout.splitlines())
    assert "annotated" not in listed.stdout.partition("{")[0]


@pytest.mark.slow
def test_a_folder_gets_the_parts_also_where_there_is_no_single_file(cwpo, messy, tmp_path):
    folder, file = tmp_path / "weighted", tmp_path / "weighted.parquet"
    submitted = cwpo("jobs", "submit", messy, "-o", f"{folder}/", "--merge", "never", "--json")
    assert submitted.returncode == 0
    assert f"{folder}: 3 rows" in submitted.stderr
    assert "see " + str(tmp_path / "weighted.errors.jsonl") in submitted.stderr
    (part,) = folder.glob("*.parquet")
    assert pq.read_table(part).num_rows == 3
    assert len((tmp_path / "weighted.errors.jsonl").read_text().splitlines()) == 4
    job_id = json.loads(submitted.stdout)["id"]
    refused = cwpo("jobs", "download", job_id, "-o", file)
    assert refused.returncode == 1
    assert f"cwpo jobs download {job_id} -o FOLDER/" in refused.stderr
    assert not file.exists()
    part.unlink()
    assert cwpo("jobs", "download", job_id, "-o", folder).returncode == 0
    assert part.exists()


@pytest.mark.slow
def test_a_file_is_annotated_to_a_folder(cwpo, messy, tmp_path):
    folder = tmp_path / "weighted"
    assert cwpo("annotate", messy, "-o", folder).returncode == 0
    (part,) = folder.glob("*.parquet")
    assert pq.read_table(part)["id"].to_pylist() == ["x1", "7", "7"]


@pytest.mark.slow
def test_several_files_and_folders_are_one_input(cwpo, good, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    files = [folder / "2.jsonl", folder / "1.jsonl", tmp_path / "3.jsonl"]
    for row, file in zip([good[1], good[0], good[0]], files, strict=True):
        file.write_text(json.dumps(row) + "\n")
    (folder / "notes.txt").write_text("not triplets")
    output = tmp_path / "weighted.jsonl"
    submitted = cwpo("jobs", "submit", folder, files[2], "-o", output)
    assert submitted.returncode == 0, submitted.stderr
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert ids == ["x1", "7", "x1"]
    refused = cwpo("jobs", "submit", tmp_path / "nothing")
    assert refused.returncode == 1
    assert "no such file" in refused.stderr


def test_an_input_on_the_service_s_side_is_not_looked_for_here(cwpo):
    result = cwpo("jobs", "submit", "2026/rows.jsonl", "--on-server")
    assert result.returncode == 1
    assert "its operator has set no --input-prefix" in result.stderr


@pytest.mark.slow
def test_output_that_nobody_reads_ends_a_command_without_a_word(cwpo, up, unread, messy, tmp_path):
    assert cwpo("jobs", "submit", messy, "--wait").returncode == 0
    for shown in ("--json", "--limit=1"):
        result = unread("jobs", "list", shown, CWPO_URL=up)
        assert (result.returncode, result.stderr) == (141, ""), shown
    output = tmp_path / "weighted.jsonl"
    result = unread("annotate", messy, "-o", output, stream="stderr", CWPO_URL=up)
    assert (result.returncode, result.stdout) == (141, "")
    assert not output.exists()


def test_a_job_that_fails_says_why_and_leaves_no_output(cwpo, tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet at all")
    output = tmp_path / "weighted.parquet"
    result = cwpo("jobs", "submit", broken, "-o", output)
    assert result.returncode == 1
    assert "not a readable Parquet file" in result.stderr.splitlines()[-1]
    assert not output.exists()
