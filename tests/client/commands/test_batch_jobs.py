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
