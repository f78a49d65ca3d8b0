"""A dataset is downloaded as a folder of parts, over a connection that breaks off."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pyarrow.parquet as pq
import pytest

from cwpo import Client
from cwpo.datasets.folder import dataset_files
from cwpo.errors import ConnectionFailedError, DamagedDownloadError, DatasetError
from harness import TIMEOUT, House, furnished

ROWS = 10_000


class Relay(ThreadingHTTPServer):
    """Passes requests on to a service, and notes the names of parts and their ranges.

    cuts: numbers of bytes after which the next answers with a part break off.
    spoiled: whether the first byte of a part is changed.
    store_status: that of a store which it plays too, and whose URLs it adds to lists of parts.
    keys: the API keys that the store was sent.
    """

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), RelayHandler)
        self.http = httpx2.Client(base_url=url, timeout=TIMEOUT)
        self.asked: list[tuple[str, str | None]] = []
        self.cuts: list[int] = []
        self.spoiled = False
        self.store_status: int | None = None
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class RelayHandler(BaseHTTPRequestHandler):
    server: Relay

    def do_GET(self):
        span = self.headers["range"]
        path = self.path.removeprefix("/store")
        answer = self.server.http.get(path, headers={"Range": span} if span else {})
        content = answer.content
        if path.endswith("/parts") and self.server.store_status:
            listed = answer.json()
            for part in listed["parts"]:
                part["url"] = f"{self.server.url}/store{path}/{part['name']}"
            content = json.dumps(listed).encode()
        if path != self.path:
            self.server.keys.append(self.headers["authorization"])
            if self.server.store_status != 200:
                self.send_error(self.server.store_status)
                return
        self.send_response(answer.status_code)
        for name in ("content-type", "content-range"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if "/parts/" in path:
            with self.server.lock:
                self.server.asked.append((path.rsplit("/", 1)[-1], span))
                cut = self.server.cuts.pop(0) if self.server.cuts else None
            if self.server.spoiled:
                content = b"X" + content[1:]
            if cut is not None:
                self.wfile.write(content[:cut])
                self.close_connection = True
                return
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with furnished(tmp_path_factory.mktemp("house")) as house:
        yield house


@pytest.fixture(scope="module")
def job_id(house):
    """A job that has ended, of three parts and no single file."""
    job_id = house.submit(House.rows(ROWS), merge="never")
    house.work()
    return job_id


@pytest.fixture
def relay(house):
    relay = Relay(house.url)
    thread = threading.Thread(target=relay.serve_forever)
    thread.start()
    yield relay
    relay.shutdown()
    thread.join()
    relay.server_close()
    relay.http.close()


def rows_in(folder):
    """The rows of the folder's files in the order of their names."""
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


@pytest.mark.slow
def test_a_folder_has_the_parts_and_their_list(use, house, job_id, tmp_path):
    folder = tmp_path / "weighted"
    assert use(house.url, lambda client: client.jobs.download_parts(job_id, folder)) == folder
    assert rows_in(folder) == House.expected(House.rows(ROWS))
    listed = json.loads((folder / "dataset.json").read_text())
    assert [part["name"] for part in listed["parts"]] == [
        f"part-0000000{n}.parquet" for n in range(3)
    ]
    assert (listed["rows"], listed["schema"][0]) == (ROWS, {"name": "id", "type": "string"})
    names = {path.name for path in folder.iterdir()}
    assert names == {"dataset.json", *(part["name"] for part in listed["parts"])}


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on_where_it_was(use, relay, job_id, tmp_path):
    relay.cuts = [1000, 2000]
    use(relay.url, lambda client: client.jobs.download_parts(job_id, tmp_path / "w"))
    assert rows_in(tmp_path / "w") == House.expected(House.rows(ROWS))
    spans = sorted(span for _, span in relay.asked if span)
    assert spans == ["bytes=1000-", "bytes=2000-"]


@pytest.mark.slow
def test_a_second_run_gets_only_what_the_first_has_not(use, relay, job_id, tmp_path):
    folder = tmp_path / "w"
    relay.cuts = [500] * 3
    # Without retries the first run ends at the first cut.
    with pytest.raises(ConnectionFailedError):
        use(relay.url, lambda client: client.jobs.download_parts(job_id, folder), max_retries=0)
    assert not (folder / "dataset.json").exists()
    with pytest.raises(DatasetError, match="repeat `cwpo jobs download"):
        dataset_files(folder)
    relay.cuts.clear()
    use(relay.url, lambda client: client.jobs.download_parts(job_id, folder))
    assert rows_in(folder) == House.expected(House.rows(ROWS))
    relay.asked.clear()
    (folder / "part-00000001.parquet").write_bytes(b"no part")
    use(relay.url, lambda client: client.jobs.download_parts(job_id, folder))
    assert relay.asked == [("part-00000001.parquet", None)]
    assert rows_in(folder) == House.expected(House.rows(ROWS))


@pytest.mark.slow
def test_a_part_with_another_checksum_is_never_kept(use, relay, job_id, tmp_path):
    relay.spoiled = True
    with pytest.raises(DamagedDownloadError, match=r"part-0000000\d\.parquet: .* checksum"):
        use(
            relay.url,
            lambda client: client.jobs.download_parts(job_id, tmp_path / "w"),
            max_retries=0,
        )
    assert list((tmp_path / "w").glob("*.parquet")) == []
    assert not (tmp_path / "w" / "dataset.json").exists()


@pytest.mark.slow
def test_parts_come_from_the_store_which_is_not_told_the_key(use, relay, job_id, tmp_path):
    relay.store_status = 200
    folder = tmp_path / "w"
    use(relay.url, lambda client: client.jobs.download_parts(job_id, folder), api_key="secret")
    assert rows_in(folder) == House.expected(House.rows(ROWS))
    assert relay.keys == [None] * 3
    # Whoever has the folder cannot read the store.
    assert "url" not in (folder / "dataset.json").read_text()


@pytest.mark.slow
def test_a_store_that_refuses_is_given_up_for_the_service(use, relay, job_id, tmp_path):
    relay.store_status = 403
    use(relay.url, lambda client: client.jobs.download_parts(job_id, tmp_path / "w"))
    assert rows_in(tmp_path / "w") == House.expected(House.rows(ROWS))
    assert (len(relay.keys), len(relay.asked)) == (3, 3)


@pytest.mark.slow
def test_a_folder_with_parts_of_another_dataset_is_refused(house, job_id, tmp_path):
    (tmp_path / "part-00000007.parquet").write_bytes(b"another's")
    with Client(house.url) as client, pytest.raises(DatasetError, match="part-00000007"):
        client.jobs.download_parts(job_id, tmp_path)


@pytest.mark.slow
def test_other_tools_read_the_folder(house, job_id, tmp_path):
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    from datasets import load_dataset

    folder = tmp_path / "weighted"
    with Client(house.url) as client:
        client.jobs.download_parts(job_id, folder)
    files = f"{folder}/*.parquet"
    expected = House.expected(House.rows(ROWS))
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")
    assert loaded.to_list() == expected
    assert polars.read_parquet(files).to_dicts() == expected
    read = duckdb.read_parquet(files)
    assert [dict(zip(read.columns, row, strict=True)) for row in read.fetchall()] == expected
