"""Jobs on inputs that were not uploaded."""

import hashlib
import os

import pytest

from cwpo.errors import DatasetError
from cwpo.types import JobRequest
from cwpo_worker.errors import InputRefusedError, StoreError, UnknownFileError
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.storage.inputs import InputPrefix
from cwpo_worker.storage.store import BlobStore


@pytest.fixture
def shelf(tmp_path):
    """A folder of inputs with one file, beside a secret."""
    folder = tmp_path / "shelf"
    (folder / "2026").mkdir(parents=True)
    (folder / "2026" / "a.jsonl").write_text("{}\n")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jsonl",
        "2026/../../secret.jsonl",
        "..",
        "/etc/passwd.jsonl",
        "//etc/passwd.jsonl",
        "./2026/a.jsonl",
        "2026//a.jsonl",
        "2026\\..\\a.jsonl",
        "file:///etc/passwd.jsonl",
        "http://169.254.169.254/latest/meta-data.jsonl",
        "s3://other/a.jsonl",
        "zip://a.jsonl::http://example.org/x.zip",
        "2026/*.jsonl",
        "2026/[a].jsonl",
        "2026/.hidden.jsonl",
        "2026/a.jsonl\n",
        "2026/a\x00.jsonl",
        "",
    ],
)
def test_a_name_that_could_lead_elsewhere_is_refused(shelf, name):
    with pytest.raises(InputRefusedError, match="path below the service's --input-prefix"):
        InputPrefix(str(shelf)).find(name)


def test_a_link_out_of_the_prefix_is_refused_and_one_within_is_not(shelf):
    (shelf / "out.jsonl").symlink_to("../secret.jsonl")
    (shelf / "in.jsonl").symlink_to("2026/a.jsonl")
    (shelf / "up").symlink_to("..")
    prefix = InputPrefix(str(shelf))
    for name in ("out.jsonl", "up/secret.jsonl"):
        with pytest.raises(InputRefusedError, match="leads out"):
            prefix.find(name)
    with prefix.find("in.jsonl").open() as stream:
        assert stream.read() == b"{}\n"


def test_what_is_not_there_or_no_file_of_triplets_is_said(shelf):
    prefix = InputPrefix(f"{shelf}/")
    with pytest.raises(UnknownFileError, match=r"no input '2026/b\.jsonl'"):
        prefix.find("2026/b.jsonl")
    (shelf / "folder.jsonl").mkdir()
    with pytest.raises(UnknownFileError, match="is not a file"):
        prefix.find("folder.jsonl")
    with pytest.raises(DatasetError, match=r"a\.csv"):
        prefix.find("a.csv")
    with pytest.raises(StoreError, match="cannot be read"):
        InputPrefix("nosuchscheme://x").find("a.jsonl")


def submit(house, name, prefix):
    ledger = Ledger(house.redis, house.store, house.lifecycle, house.files, InputPrefix(prefix))
    return ledger.submit(JobRequest(input=name), owner=None, idempotency_key=None).id


@pytest.mark.slow
@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz", "parquet"])
def test_a_job_reads_its_input_where_it_lies(house, shelf, encoded, format):
    rows = house.rows(50)
    data = encoded(rows, format)
    path = shelf / f"rows.{format}"
    path.write_bytes(data)
    job_id = submit(house, path.name, str(shelf))
    assert house.start_worker("--burst").wait() == 0
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.file_id, job.input) == ("completed", None, path.name)
    assert house.results(job_id) == house.expected(rows)
    manifest = JobFolder(job_id).read_manifest(house.store)
    assert manifest.input_sha256 == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data


@pytest.mark.slow
def test_a_job_reads_its_input_from_s3(make_house, s3, encoded):
    import fsspec

    house = make_house(f"{s3}/store")
    rows = house.rows(50)
    fsspec.filesystem("s3").pipe_file(f"{s3}/shelf/2026/a.parquet", encoded(rows, "parquet"))
    job_id = submit(house, "2026/a.parquet", f"{s3}/shelf")
    assert house.start_worker("--burst").wait() == 0
    assert house.ledger.get(job_id, owner=None).error is None
    assert house.results(job_id) == house.expected(rows)


def test_an_input_that_changes_after_the_submission_fails_the_job(house, shelf):
    job_id = submit(house, "2026/a.jsonl", str(shelf))
    (shelf / "2026" / "a.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DatasetError, match="changed since the job was submitted"):
        house.plan(job_id)


def test_an_input_that_changes_while_it_is_read_gives_no_manifest(house, shelf, encoded):
    path = shelf / "2026" / "a.jsonl"
    path.write_bytes(encoded(house.rows(5), "jsonl"))
    found = InputPrefix(str(shelf)).find("2026/a.jsonl")

    def read():
        with found.open() as stream:
            stream.read()
            os.utime(path, (1, 1))

    with pytest.raises(DatasetError, match="changed"):
        read()


@pytest.mark.slow
def test_an_input_that_is_gone_fails_the_job_without_the_prefix_in_the_reason(house, shelf):
    job_id = submit(house, "2026/a.jsonl", str(shelf))
    (shelf / "2026" / "a.jsonl").unlink()
    assert house.start_worker("--burst").wait() == 0
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.error) == ("failed", "there is no input 'a.jsonl'")


def submit_folder(house, name, prefix):
    ledger = Ledger(house.redis, house.store, house.lifecycle, house.files, InputPrefix(prefix))
    return ledger.submit(JobRequest(prefix=name), owner=None, idempotency_key=None).id


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_job_reads_all_files_of_a_folder_in_the_order_of_their_names(
    house, encoded, place, request, tmp_path
):
    rows = house.rows(60)
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    store = BlobStore(root)
    for name, format, some in (("b", "parquet", rows[20:40]), ("a", "jsonl", rows[:20])):
        store.put(f"shelf/2026/{name}.{format}", encoded(some, format))
    store.put("shelf/2026/c.jsonl.gz", encoded(rows[40:], "jsonl.gz"))
    store.put("shelf/2026/notes.txt", b"no triplets")
    store.put("shelf/2026/deeper/d.jsonl", b"neither")
    job_id = submit_folder(house, "2026", f"{root}/shelf")
    assert house.start_worker("--burst").wait() == 0
    job = house.ledger.get(job_id, owner=None)
    assert (job.state, job.prefix, job.input) == ("completed", "2026", None)
    assert house.results(job_id) == house.expected(rows)


def test_a_file_of_a_folder_that_has_changed_fails_the_job_by_name(house, shelf):
    (shelf / "2026" / "b.jsonl").write_text("{}\n")
    job_id = submit_folder(house, "2026", str(shelf))
    (shelf / "2026" / "b.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DatasetError, match=r"b\.jsonl has changed"):
        house.plan(job_id)


def test_a_folder_leads_nowhere_else(shelf, tmp_path):
    prefix = InputPrefix(str(shelf))
    for name in ("..", "../shelf", "/etc", "2026/*", "", ".hidden"):
        with pytest.raises(InputRefusedError):
            prefix.find_all(name)
    (shelf / "up").symlink_to("..")
    with pytest.raises(InputRefusedError, match="leads out"):
        prefix.find_all("up")
    (shelf / "2026" / "out.jsonl").symlink_to("../../secret.jsonl")
    with pytest.raises(InputRefusedError, match="leads out"):
        prefix.find_all("2026")
    (shelf / "empty").mkdir()
    for name in ("empty", "none"):
        with pytest.raises(UnknownFileError, match=name):
            prefix.find_all(name)
