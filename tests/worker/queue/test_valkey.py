import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cwpo_worker.errors import ValkeyError
from cwpo_worker.queue.valkey import EmbeddedValkey
from harness import TIMEOUT

PARENT = """
import signal, sys
from pathlib import Path
from cwpo_worker.queue.valkey import EmbeddedValkey
server = EmbeddedValkey(Path(sys.argv[1]))
server.start()
print(server.url, flush=True)
signal.pause()
"""


@pytest.fixture
def parent(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()


def answers(url):
    client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0))
    try:
        return client.ping()
    except redis.RedisError:
        return False
    finally:
        client.close()


def test_a_password_is_required_and_shown_to_nobody(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        assert answers(server.url)
        without = "redis://" + server.url.split("@")[1]
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(without).ping()
        password = server.url.split(":")[2].split("@")[0]
        assert stat.S_IMODE((tmp_path / "valkey.conf").stat().st_mode) == 0o600
        commands = subprocess.run(
            ["ps", "axww", "-o", "command"], capture_output=True, text=True, check=True
        )
        assert "valkey-server" in commands.stdout
        assert password not in commands.stdout


def test_it_listens_on_loopback_only(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        port = int(server.url.rsplit(":", 1)[1].split("/")[0])
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
        assert [address for address in listening if address.endswith(f":{port:04X}")] == [
            f"0100007F:{port:04X}"
        ]


def test_data_outlives_a_restart(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        redis.Redis.from_url(server.url).set("k", "v")
    assert not answers(server.url)
    with EmbeddedValkey(tmp_path) as server:
        assert redis.Redis.from_url(server.url).get("k") == b"v"


def test_started_again_after_it_was_killed_it_is_found_where_it_was(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        url = server.url
        redis.Redis.from_url(url).set("k", "v")
        os.kill(server._process.pid, signal.SIGKILL)
        while server.poll() is None:
            time.sleep(0.01)
        assert not answers(url)
        server.start()
        assert server.url == url
        assert redis.Redis.from_url(url).get("k") == b"v"


def test_it_dies_with_its_parent(parent):
    url = parent.stdout.readline().strip()
    assert answers(url)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + TIMEOUT
    while answers(url):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_in_use_is_refused_and_its_server_left_alone(parent, tmp_path):
    url = parent.stdout.readline().strip()
    with pytest.raises(ValkeyError, match=f"in use by process {parent.pid}"):
        EmbeddedValkey(tmp_path).start()
    assert answers(url)


def test_a_server_that_outlived_its_parent_is_replaced(tmp_path):
    orphan = EmbeddedValkey(tmp_path)
    orphan.start()
    old = orphan.url
    redis.Redis.from_url(old).set("k", "v")
    # The lock goes with the parent; the server, here, does not.
    orphan._lock.close()
    with EmbeddedValkey(tmp_path) as server:
        assert not answers(old)
        assert redis.Redis.from_url(server.url).get("k") == b"v"
    orphan.stop()


def test_a_server_that_does_not_start_says_why(tmp_path):
    (tmp_path / "appendonlydir").write_text("in the way")
    with pytest.raises(ValkeyError, match=r"did not start: .*appendonly"):
        EmbeddedValkey(tmp_path).start()
