"""What `cwpo doctor` finds of Redis and of the store, on real ones."""

import re

import pytest
import redis

from cwpo_worker.checks import queue, store
from cwpo_worker.queue.valkey import EmbeddedValkey


@pytest.fixture(scope="module")
def valkey(tmp_path_factory):
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def configured(valkey):
    """`configured(name=value)`: sets it until the test ends."""
    with redis.Redis.from_url(valkey.url) as connection:
        before = {}

        def configure(**values):
            for name, value in values.items():
                setting = name.replace("_", "-")
                before[setting] = connection.config_get(setting)[setting]
                connection.config_set(setting, value)

        yield configure
        for name, value in before.items():
            connection.config_set(name, value)


def problems(found):
    return [finding for finding in found if finding.level != "ok"]


def test_a_queue_that_is_well_is_found_so(valkey):
    found = list(queue(valkey.url))
    assert problems(found) == []
    assert found[0].said.startswith("Valkey ")
    assert found[-1].said == "that of Valkey agrees with this one"


def test_keys_that_may_be_evicted_are_wrong_with_the_command_that_mends_it(valkey, configured):
    configured(maxmemory_policy="allkeys-lru")
    (found,) = problems(queue(valkey.url))
    assert found.level == "wrong"
    assert "maxmemory-policy allkeys-lru" in found.said
    assert "CONFIG SET maxmemory-policy noeviction" in found.fix


def test_a_queue_that_keeps_nothing_is_a_warning(valkey, configured):
    configured(appendonly="no", save="")
    (found,) = problems(queue(valkey.url))
    assert (found.level, "keeps nothing over a restart" in found.said) == ("warning", True)
    configured(save="3600 1")
    assert problems(queue(valkey.url)) == []


def test_memory_that_is_nearly_used_up_is_a_warning(valkey, configured):
    with redis.Redis.from_url(valkey.url) as connection:
        used = connection.info()["used_memory"]
    configured(maxmemory=int(used * 1.05))
    (found,) = problems(queue(valkey.url))
    assert (found.level, "of its maxmemory are used" in found.said) == ("warning", True)


def test_a_replica_cannot_be_the_queue(valkey):
    with redis.Redis.from_url(valkey.url) as connection:
        connection.execute_command("REPLICAOF", "127.0.0.1", 9)
        found = problems(queue(valkey.url))
        connection.execute_command("REPLICAOF", "NO", "ONE")
    assert any("a replica" in finding.said and finding.level == "wrong" for finding in found)


def test_a_queue_that_is_not_there_or_refuses_the_password_is_wrong(valkey):
    (found,) = queue("redis://:hush@127.0.0.1:9/0")
    assert found.level == "wrong"
    assert "hush" not in found.said
    (found,) = queue(re.sub("//.*@", "//:hush@", valkey.url))
    assert (found.level, "password" in found.said) == ("wrong", True)
    assert "hush" not in found.said


def test_a_store_is_written_read_and_left_as_it_was(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (found,) = store(str(tmp_path))
    assert (found.level, found.said) == ("ok", f"{tmp_path}: a probe was written, read and deleted")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept"]


def test_a_store_that_is_not_there_is_not_created(tmp_path):
    (found,) = store(str(tmp_path / "typo"))
    assert found.level == "warning"
    assert not (tmp_path / "typo").exists()


def test_a_store_that_cannot_be_used_is_wrong(tmp_path):
    (tmp_path / ".partial").write_text("in the way")
    (found,) = store(str(tmp_path))
    assert found.level == "wrong"
    (found,) = store("nonsense://bucket")
    assert (found.level, "nonsense" in found.said) == ("wrong", True)
