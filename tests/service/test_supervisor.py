import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from hashlib import sha256

import httpx2
import psutil
import pytest

from cwpo import Client, Triplet
from cwpo_annotator import Annotator
from cwpo_service.server import listen
from harness import TIMEOUT, Up, lives


@pytest.fixture
def up(tmp_path):
    with ExitStack() as stack:

        def start(*arguments, **environment):
            running = Up(tmp_path / "data", "--backend", "null", *arguments, **environment)
            stack.callback(running.close)
            return running

        yield start


@pytest.fixture
def rows(tmp_path, triplet):
    path = tmp_path / "triplets.jsonl"
    rows = [triplet(n, id=f"r{n}") for n in range(500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_a_job_goes_all_the_way_and_ctrl_c_leaves_nothing_but_the_data(up, rows, tmp_path):
    running = up("--workers", "2")
    everyone = running.children()
    with Client(running.url) as client:
        job = client.jobs.create(client.files.upload(rows).id)
        done = client.jobs.wait(job.id)
        out = client.jobs.download(done.id, tmp_path / "weighted.jsonl", format="jsonl")
    got = [json.loads(line) for line in out.read_text().splitlines()]
    triplets = [Triplet(**json.loads(line)) for line in rows.read_text().splitlines()]
    expected = Annotator.null().annotate(triplets)
    assert [row["id"] for row in got] == [annotation.id for annotation in expected]
    assert [row["preferred"] for row in got] == [annotation.preferred for annotation in expected]
    running.stop()
    assert running.process.returncode == 0
    # The server, the service and two workers at least; none is left.
    assert len(everyone) >= 4
    assert not any(lives(child) for child in everyone)
    with Client(up("--workers", "1").url) as client:
        assert client.jobs.get(job.id) == done


@pytest.mark.slow
def test_sigterm_stops_all_too(up, tmp_path):
    running = up("--workers", "1")
    everyone = running.children()
    assert not any("redis://" in " ".join(child.cmdline()) for child in everyone)
    assert "in use by process" in failing("--backend", "null", "--port", "0", tmp_path=tmp_path)
    running.stop(signal.SIGTERM)
    assert running.process.returncode == 0
    assert not any(lives(child) for child in everyone)


@pytest.mark.slow
def test_the_children_die_with_a_killed_parent(up):
    running = up("--workers", "1")
    everyone = running.children()
    running.process.kill()
    _, alive = psutil.wait_procs(everyone, timeout=TIMEOUT)
    assert alive == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cwpo serve", "cwpo worker", "valkey"])
def test_what_crashes_is_started_again(up, rows, name):
    running = up("--workers", "1")
    victim = running.child(name)
    victim.kill()
    victim.wait(TIMEOUT)
    while not running.child(name):
        assert running.process.poll() is None
    with Client(running.url, max_retries=20) as client:
        job = client.jobs.wait(client.jobs.create(client.files.upload(rows).id).id)
    assert job.state == "completed"
    running.stop()
    assert running.process.returncode == 0


@pytest.mark.slow
def test_with_keys_the_workers_have_one_of_their_own(up, rows, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{sha256(b'wonderland').hexdigest()}\n")
    running = up("--workers", "1", CWPO_API_KEYS_FILE=str(keys))
    assert httpx2.get(f"{running.url}/model", timeout=TIMEOUT).status_code == 401
    with Client(running.url, "wonderland") as client:
        job = client.jobs.wait(client.jobs.create(client.files.upload(rows).id).id)
    assert job.state == "completed"


def failing(*arguments, tmp_path):
    """The one line with which `cwpo up` refuses to start."""
    command = [sys.executable, "-m", "cwpo", "up", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.slow
def test_an_unknown_annotator_is_one_line(tmp_path):
    line = failing("--annotator", str(tmp_path / "missing"), "--port", "0", tmp_path=tmp_path)
    assert "missing: no such folder" in line
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_busy_port_is_one_line(tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        line = failing("--backend", "null", "--port", str(port), tmp_path=tmp_path)
    assert line.startswith(f"cwpo up: 127.0.0.1:{port} is in use")


@pytest.mark.slow
def test_a_data_dir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "data").write_text("a file")
    line = failing("--backend", "null", "--port", "0", tmp_path=tmp_path)
    assert line.startswith("cwpo up: --data-dir ")
    assert "cannot be written to" in line
