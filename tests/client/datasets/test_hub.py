"""Inputs from a Hub of the tests, in processes of their own: its address is read at import."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.datasets import hub
from cwpo.errors import ConfigError
from harness import House, furnished, serving

pytestmark = pytest.mark.slow

COMMIT = "1" * 40
REPOSITORY = "owner/pairs"
ROWS = {"train": House.rows(7), "validation": House.rows(3)}


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


FILES = {f"{split}.parquet": parquet(rows) for split, rows in ROWS.items()}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as `datasets` needs to load a repository of Parquet files."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        resolved = re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.*)", path)
        if resolved is not None and resolved[1] in FILES:
            content = FILES[resolved[1]]
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        elif resolved is not None or re.search(r"/tree/[^/]+/.", path):
            self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
        elif "/tree/" in path:
            kept = [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in FILES.items()
            ]
            self.answer(200, json.dumps(kept).encode())
        elif path.startswith(f"/api/datasets/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())
        else:
            self.answer(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def answer(self, status, body, **headers):
        self.send_response(status)
        headers |= {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """`python("-m", "cwpo", ..., url=)`: a process that knows the Hub and the service."""
    cache = tmp_path_factory.mktemp("hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()

        def run(*words, url="http://127.0.0.1:9"):
            environment = os.environ | {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(cache),
                "HF_DATASETS_CACHE": str(cache / "datasets"),
                "NO_PROXY": "127.0.0.1",
                "CWPO_URL": url,
            }
            command = [sys.executable, *map(str, words)]
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )

        yield run
        server.shutdown()


@pytest.mark.parametrize(("source", "split"), [("", "train"), ("@validation", "validation")])
def test_a_split_is_annotated_by_requests(python, tmp_path, source, split):
    output = tmp_path / "weighted.jsonl"
    with serving() as service:
        words = ("-m", "cwpo", "annotate", f"hub:{REPOSITORY}{source}", "-o", output, "--json")
        result = python(*words, url=service.url)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["rows"] == len(ROWS[split])
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == House.expected(ROWS[split])


def test_a_split_is_submitted_as_a_job_and_the_sdk_reads_one(python, tmp_path):
    code = (
        "from cwpo import Client\n"
        "with Client() as client:\n"
        f"    labels = client.annotate('hub:{REPOSITORY}@train[:2]', progress=True).annotations\n"
        f"    job = client.jobs.submit('hub:{REPOSITORY}@validation')\n"
        "print(job.id, *(label.id for label in labels))\n"
    )
    with furnished(tmp_path / "house") as house:
        result = python("-c", code, url=house.url)
        assert result.returncode == 0, result.stderr
        assert "annotate: 2 rows" in result.stderr
        job_id, *labels = result.stdout.split()
        assert labels == ["row-0", "row-1"]
        words = ("-m", "cwpo", "jobs", "submit", f"hub:{REPOSITORY}", "--json")
        submitted = python(*words, url=house.url)
        house.work()
        assert house.results(job_id) == House.expected(ROWS["validation"])
        other = json.loads(submitted.stdout)["id"]
        assert house.results(other) == House.expected(ROWS["train"])


def test_what_the_hub_does_not_have_is_one_line(python, tmp_path):
    output = tmp_path / "weighted.jsonl"
    for source, reason in (
        (f"hub:{REPOSITORY}@test", 'Unknown split "test"'),
        ("hub:owner/nothing", "owner/nothing"),
        ("hub:pairs", "a dataset of the Hub is hub:owner/name@split"),
    ):
        result = python("-m", "cwpo", "annotate", source, "-o", output)
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"cwpo annotate: {source}: ")
        assert reason in last
        assert "Traceback" not in result.stderr
    assert not output.exists()


def test_without_the_package_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'cwpo\[datasets\]'"):
        hub.file(f"hub:{REPOSITORY}")
