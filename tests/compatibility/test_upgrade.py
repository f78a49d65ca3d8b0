"""A fleet that is upgraded, process by process, while a job runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cwpo import Client
from cwpo.process import free_port
from harness import House

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

ROWS = 200_000
TIMEOUT = 300.0


@pytest.fixture
def earlier(request):
    """The command of an earlier version, which is installed in another checkout."""
    folder = request.config.getoption("chaos_earlier")
    if folder is None:
        pytest.skip("no --chaos-earlier: make chaos EARLIER=FOLDER, another checkout after setup")
    return [str(Path(folder) / ".venv" / "bin" / "cwpo")]


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.close()


class Fleet:
    """A service and workers over the queue and the store of a house."""

    def __init__(self, house):
        self._house = house
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._processes = {}

    def start(self, name, command):
        """Start the service or a worker; one of that name is stopped first, and finishes its work.

        Args:
            command: `cwpo` of one version or another.
        """
        if name in self._processes:
            self._processes[name].send_signal(signal.SIGTERM)
            assert self._processes[name].wait(TIMEOUT) == 0
        flags = ["serve", "--backend", "null", "--port", str(self._port)]
        self._processes[name] = subprocess.Popen(
            [*command, *(flags if name == "service" else ["worker"])],
            env={
                **os.environ,
                "CWPO_URL": self.url,
                "CWPO_REDIS_URL": self._house.valkey.url,
                "CWPO_STORE_URL": self._house.store_url,
            },
        )

    def stop(self):
        for process in self._processes.values():
            process.kill()
            process.wait()


@pytest.mark.timeout(900)
def test_a_rolling_upgrade_changes_nothing_in_the_dataset(earlier, house, tmp_path):
    now = [sys.executable, "-m", "cwpo"]
    rows = house.rows(ROWS)
    rows[ROWS // 3] = {"prompt": "alone"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fleet = Fleet(house)
    try:
        for name in ("service", "worker-1", "worker-2"):
            fleet.start(name, earlier)
        with Client(fleet.url, max_retries=12) as client:
            file = client.files.upload(path)
            undisturbed = client.jobs.wait(client.jobs.create(file.id).id)
            job_id, during = client.jobs.create(file.id).id, []
            for share, name in ((0.1, "worker-1"), (0.3, "service"), (0.5, "worker-2")):
                house.wait_for(
                    job_id, lambda job, s=share: job.progress.rows_done > s * ROWS, TIMEOUT
                )
                fleet.start(name, now)
                # Both versions plan jobs for a while, and work on those of the other.
                during.append(client.jobs.create(file.id).id)
            jobs = [client.jobs.wait(each) for each in (job_id, *during)]
        for job in jobs:
            assert job.state == undisturbed.state == "completed_with_errors", job.error
            assert house.results(job.id) == house.results(undisturbed.id)
            assert house.errors(job.id) == house.errors(undisturbed.id)
    finally:
        fleet.stop()
