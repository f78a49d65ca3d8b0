"""Jobs as objects: from rows or files of any kind to the rows of the dataset."""

import json
import threading
from base64 import b64encode
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from cwpo import CwpoError
from cwpo.datasets.triplets import read_rows
from cwpo.errors import ConflictError, ConnectionFailedError, DamagedDownloadError, DatasetError
from harness import House, furnished

ROWS = House.rows(5000)
NAMES = {"prompt": "question", "response_a": "first", "response_b": "second"}
OTHERS = [
    {"id": row["id"], **{theirs: row[ours] for ours, theirs in NAMES.items()}} for row in ROWS
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with furnished(tmp_path_factory.mktemp("house")) as house:
        yield house


def called(use, url, *steps, **options):
    """What a chain of calls gives, each awaited by an async client: steps take what came before."""

    def run(client):
        if type(client).__name__ == "Client":
            value = client
            for step in steps:
                value = step(value)
            return list(value) if hasattr(value, "__next__") else value

        async def run_async():
            value = client
            for step in steps:
                value = step(value)
                if hasattr(value, "__await__"):
                    value = await value
            return [each async for each in value] if hasattr(value, "__anext__") else value

        return run_async()

    return use(url, run, **options)


@pytest.mark.slow
def test_a_job_of_rows_from_submit_to_results(use, house, tmp_path, capsys):
    job = called(
        use,
        house.url,
        lambda client: client.jobs.submit(iter(OTHERS), columns=NAMES, progress=True),
    )
    assert "upload: " in capsys.readouterr().err
    house.work()
    expected = House.expected(ROWS)

    def opened(client):
        return client.jobs.open(job.id)

    ended = called(use, house.url, opened, lambda job: job.wait(progress=True))
    assert ended.progress.rows_annotated == 5000
    assert "job completed: 5,000 of 5,000 rows" in capsys.readouterr().err
    # Over two parts.
    assert called(use, house.url, opened, lambda job: job.results()) == expected
    for name in ("weighted.jsonl", "weighted.parquet"):
        output = tmp_path / name
        called(use, house.url, opened, lambda job, path=output: job.download(path))
        with output.open("rb") as stream:
            found = [row for _, row in read_rows(stream, name.rpartition(".")[2])]
        assert found == expected
    called(use, house.url, opened, lambda job: job.download(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("*.parquet"))) == 2


def test_the_same_submission_is_one_job(use, house):
    table = pa.Table.from_pylist(ROWS[:3])
    key = f"first-{use.__name__}"

    def submit(rows, key=key):
        return lambda client: client.jobs.submit(rows, idempotency_key=key)

    job = called(use, house.url, submit(table))
    assert called(use, house.url, submit(ROWS[:3])).id == job.id
    with pytest.raises(ConflictError, match="Idempotency-Key"):
        called(use, house.url, submit(ROWS[:2]))
    assert called(use, house.url, submit(ROWS[:3], key=None)).id != job.id


def test_several_files_are_one_job(use, house, tmp_path):
    for name in "12":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "3.csv").write_text("question,first,second\np,a,b\n")
    for source, files in ((tmp_path / "1.jsonl", 1), (str(tmp_path / "*.jsonl"), 2)):
        job = called(use, house.url, lambda client, source=source: client.jobs.submit(source)).job
        assert len(job.file_ids or [job.file_id]) == files
    with pytest.raises(DatasetError, match=r"3\.csv: a row needs the columns"):
        called(use, house.url, lambda client: client.jobs.submit(tmp_path))


def test_a_cancelled_job_is_known_as_such(use, house):
    job = called(
        use, house.url, lambda client: client.jobs.submit(ROWS[:3]), lambda job: job.cancel()
    )
    assert job.state == "cancelled"
    with pytest.raises(CwpoError, match="cancelled"):
        called(use, house.url, lambda client: client.jobs.open(job.id), lambda job: job.wait())


CONTENT = bytes(range(256)) * 20


class Flaky(ThreadingHTTPServer):
    """Serves a file by ranges, unless If-Range names another version, and breaks off.

    cuts: numbers of bytes after which the next answers break off.
    damaged: number of answers whose last byte is wrong.
    digest: its Repr-Digest, where it states one.
    """

    def __init__(self, cuts):
        super().__init__(("127.0.0.1", 0), FlakyHandler)
        self.cuts = list(cuts)
        self.asked = []
        self.version = "one"
        self.damaged = 0
        self.digest = None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()


class FlakyHandler(BaseHTTPRequestHandler):
    server: Flaky

    def do_GET(self):
        server = self.server
        span, etag = self.headers["range"], f'"{server.version}"'
        server.asked.append(span)
        start = 0
        if span and self.headers["if-range"] in (None, etag):
            start = int(span.removeprefix("bytes=").removesuffix("-"))
        content = CONTENT if server.version == "one" else CONTENT[::-1]
        self.send_response(206 if start else 200)
        self.send_header("ETag", etag)
        if server.digest is not None:
            self.send_header("Repr-Digest", server.digest)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if server.damaged and not server.cuts:
            server.damaged -= 1
            content = content[:-1] + b"?"
        cut = server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:cut])
        self.close_connection = True
        if server.cuts == ["change"]:
            server.version, server.cuts = "two", []

    def log_message(self, *_):
        pass


@pytest.fixture
def flaky():
    servers = []

    def start(*cuts):
        servers.append(Flaky(cuts))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_file_goes_on_where_its_download_broke_off(use, flaky, tmp_path):
    server, path = flaky(2000, 3000, 3500), tmp_path / "weighted.jsonl"
    called(use, server.url, lambda client: client.jobs.download("job-1", path), max_retries=1)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=2000-", "bytes=3000-", "bytes=3500-"]
    assert [each.name for each in tmp_path.iterdir()] == ["weighted.jsonl"]


DIGEST = f"sha-256=:{b64encode(sha256(CONTENT).digest()).decode()}:"


@pytest.mark.parametrize(("cuts", "before"), [((), []), ((2000,), [None])])
def test_a_file_that_does_not_have_the_stated_checksum_is_received_anew(
    use, flaky, tmp_path, cuts, before
):
    server, path = flaky(*cuts), tmp_path / "weighted.jsonl"
    server.damaged, server.digest = 1, f"sha-512=:AAAA:, {DIGEST}"
    called(use, server.url, lambda client: client.jobs.download("job-1", path))
    assert path.read_bytes() == CONTENT
    assert server.asked == [*before, "bytes=2000-" if cuts else None, None]


def test_a_file_that_never_has_the_stated_checksum_is_an_error_and_leaves_nothing(
    use, flaky, tmp_path
):
    server, path = flaky(), tmp_path / "weighted.jsonl"
    server.damaged, server.digest = 9, DIGEST
    with pytest.raises(DamagedDownloadError, match="does not have the checksum"):
        called(use, server.url, lambda client: client.jobs.download("job-1", path), max_retries=1)
    assert server.asked == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_another_one_by_then_begins_anew(use, flaky, tmp_path):
    server, path = flaky(2000, "change"), tmp_path / "weighted.jsonl"
    called(use, server.url, lambda client: client.jobs.download("job-1", path))
    assert path.read_bytes() == CONTENT[::-1]
    assert server.asked == [None, "bytes=2000-"]


def test_a_download_that_gets_no_further_is_an_error_and_leaves_nothing(use, flaky, tmp_path):
    server, path = flaky(100, 100, 100, 100), tmp_path / "weighted.jsonl"
    with pytest.raises(ConnectionFailedError):
        called(use, server.url, lambda client: client.jobs.download("job-1", path), max_retries=1)
    assert server.asked == [None, "bytes=100-"]
    assert list(tmp_path.iterdir()) == []
