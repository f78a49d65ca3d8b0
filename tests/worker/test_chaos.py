"""Jobs on real processes that are killed at random: what comes out is what would have come out.

`make chaos` runs the same at 200,000 rows a job and with 100 kills.
"""

import json
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress

import psutil
import pytest
import redis

from cwpo import Client
from cwpo.errors import APIError, ConnectionFailedError
from cwpo.process import free_port
from cwpo.types import FINAL_STATES
from harness import Up

pytestmark = pytest.mark.chaos

TIMEOUT = 240
KILLS_A_JOB = 10
FILES = 5
VICTIMS = {"task": 6, "worker": 4, "service": 3, "valkey": 2, "supervisor": 1}


class FragileUp(Up):
    """A `cwpo up` that is started again where it is killed."""

    def __init__(self, folder):
        flags = ("--backend", "null", "--workers", "2")
        super().__init__(folder, *flags, CWPO_HEARTBEAT_SECONDS="3")
        self.client = Client(self.url, max_retries=8)

    def kinds(self):
        """The processes that live, by what they are."""
        found = {"supervisor": [psutil.Process(self.process.pid)]}
        for process in found["supervisor"][0].children(recursive=True):
            with suppress(psutil.NoSuchProcess, IndexError):
                command, parent = process.cmdline(), process.parent()
                if "worker" in command:
                    kind = "worker" if parent.pid == self.process.pid else "task"
                elif "serve" in command:
                    kind = "service"
                else:
                    kind = "valkey" if "valkey" in command[0] else "other"
                found.setdefault(kind, []).append(process)
        return found

    def kill(self, dice):
        """SIGKILL somebody; says whom."""
        alive = {kind: found for kind, found in self.kinds().items() if kind in VICTIMS}
        kind = dice.choices(list(alive), [VICTIMS[kind] for kind in alive])[0]
        everyone = [process for found in alive.values() for process in found]
        with suppress(psutil.NoSuchProcess):
            dice.choice(alive[kind]).kill()
        if kind == "supervisor":
            self.process.communicate()
            assert psutil.wait_procs(everyone, timeout=TIMEOUT)[1] == []
            self.start()
        return kind

    def wipe(self):
        """Let Redis forget everything."""
        lines = (self.data_dir / "valkey" / "valkey.conf").read_text().splitlines()
        settings = dict(line.split(" ", 1) for line in lines)
        url = f"redis://:{settings['requirepass']}@127.0.0.1:{settings['port']}/0"
        with redis.Redis.from_url(url) as client:
            while True:
                with suppress(redis.RedisError):
                    return client.flushall()
                time.sleep(0.1)

    def has_ended(self, job_id):
        try:
            return self.client.jobs.get(job_id).state in FINAL_STATES
        except (APIError, ConnectionFailedError):
            return False  # Somebody was killed, or Redis does not know the job again yet.

    def close(self):
        everyone = [process for found in self.kinds().values() for process in found]
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=TIMEOUT)
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.client.close()


@pytest.fixture
def up(tmp_path):
    up = FragileUp(tmp_path / "data")
    yield up
    up.close()


@pytest.fixture
def scale(request):
    """Rows of a job, and kills over all."""
    return request.config.getoption("chaos_rows"), request.config.getoption("chaos_kills")


@pytest.fixture
def dice(request):
    return random.Random(request.config.getoption("chaos_seed"))


def lines_of(house, count):
    rows = house.rows(count)
    rows[count // 3] = {"prompt": "alone"}
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_kills_and_a_wiped_redis_change_nothing_in_the_dataset(up, open_house, scale, dice):
    rows, kills = scale
    lines = lines_of(open_house, rows).splitlines(keepends=True)
    path = up.data_dir / "rows.jsonl"
    files = []
    for at in range(FILES):
        path.write_text("".join(lines[at * rows // FILES : (at + 1) * rows // FILES]))
        files.append(up.client.files.upload(path).id)

    def outcome(job):
        job = up.client.jobs.wait(job.id)
        assert job.state == "completed_with_errors", job.error
        assert (job.progress.rows_annotated, job.progress.rows_failed) == (rows - 1, 1)
        result = up.client.jobs.download(job.id, up.data_dir / "out.jsonl", format="jsonl")
        errors = up.client.jobs.download_errors(job.id, up.data_dir / "errors.jsonl")
        return result.read_bytes(), errors.read_bytes()

    undisturbed = outcome(up.client.jobs.create(file_ids=files))
    assert undisturbed[0].count(b"\n") == rows - 1
    killed = []
    is_wiped = False
    while len(killed) < kills:
        job = up.client.jobs.create(file_ids=files)
        deadline = time.monotonic() + TIMEOUT
        spared = len(killed) + KILLS_A_JOB
        while not up.has_ended(job.id):
            assert time.monotonic() < deadline, (up.client.jobs.get(job.id), killed)
            time.sleep(dice.uniform(0.05, 0.8))
            if len(killed) < spared:
                killed.append(up.kill(dice))
                if not is_wiped and len(killed) >= 3:
                    up.wipe()
                    is_wiped = True
        assert outcome(job) == undisturbed, killed
    print(f"{len(killed)} kills: {killed}")


PROXY = """
    import socket, sys, threading
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=64)

    def pump(source, sink):
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        finally:
            sink.close()

    while True:
        near = listener.accept()[0]
        far = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
"""


def test_a_network_that_is_cut_changes_nothing_in_the_dataset(house, scale, dice):
    port = free_port()
    far = house.service.url.rsplit(":", 1)[1]

    def connect():
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROXY), str(port), far],
            stderr=subprocess.DEVNULL,
        )

    proxy = connect()
    try:
        data = lines_of(house, scale[0]).encode()
        house.start_worker("--url", f"http://127.0.0.1:{port}")
        undisturbed = house.wait(house.submit(data), TIMEOUT)
        asked = house.service.closes_at = house.service.requests + dice.randint(2, 20)
        job_id = house.submit(data)
        house.wait_for(job_id, lambda _: house.service.requests >= asked, TIMEOUT)
        proxy.kill()
        proxy.wait()
        house.service.gate.set()
        house.wait_for(job_id, lambda _: len(house.queue.rq.scheduled_job_registry), TIMEOUT)
        assert house.ledger.get(job_id, owner=None).state == "running"
        proxy = connect()
        job = house.wait(job_id, TIMEOUT)
        assert job.state == undisturbed.state == "completed_with_errors", job.error
        assert house.results(job_id) == house.results(undisturbed.id)
        assert house.errors(job_id) == house.errors(undisturbed.id)
    finally:
        proxy.kill()
        proxy.wait()


def test_a_disk_that_is_full_for_a_while_changes_nothing_in_the_dataset(house, scale, dice):
    folder = house.store_folder
    folder.mkdir(exist_ok=True)
    size = scale[0] * 2000
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        data = lines_of(house, scale[0]).encode()
        house.start_worker()
        undisturbed = house.wait(house.submit(data), TIMEOUT)
        asked = house.service.closes_at = house.service.requests + dice.randint(2, 20)
        job_id = house.submit(data)
        house.wait_for(job_id, lambda _: house.service.requests >= asked, TIMEOUT)
        ballast = folder / "ballast"
        with suppress(OSError), ballast.open("wb") as sink:
            while True:
                sink.write(bytes(1 << 16))
                sink.flush()
        house.service.gate.set()
        # Until a task has failed for it.
        house.wait_for(job_id, lambda _: len(house.queue.rq.scheduled_job_registry), TIMEOUT)
        threading.Timer(2.0, ballast.unlink).start()
        job = house.wait(job_id, TIMEOUT)
        assert job.state == undisturbed.state == "completed_with_errors", job.error
        assert house.results(job_id) == house.results(undisturbed.id)
        assert house.errors(job_id) == house.errors(undisturbed.id)
    finally:
        house.close()
        subprocess.run(["umount", str(folder)], check=True)
