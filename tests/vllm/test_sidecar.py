"""The chart's vLLM sidecar: its own command line, and the service that asks it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from manifests import pod_specs, rendered

from cwpo import Client, Triplet
from cwpo.process import die_with_parent, free_port
from cwpo_annotator import Annotator
from cwpo_annotator.backends.vllm.process import CPU_ARGUMENTS
from harness import TIMEOUT, url_in

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_the_service_is_answered_by_its_sidecar(vllm_python, scalar_head, tmp_path):
    folder, port = scalar_head("smollm2"), free_port()
    arguments = ["--dtype=float32", "--gpu-memory-utilization=0.3", *CPU_ARGUMENTS]
    (pod,) = [
        pod
        for pod in pod_specs(rendered({
            "annotator": {
                "model": str(folder), "existingClaim": "checkpoints", "backend": "vllm",
                "vllm": {"sidecar": True, "arguments": arguments},
            },
        }))
        if "initContainers" in pod
    ]  # fmt: skip
    (sidecar,), (service,) = pod["initContainers"], pod["containers"]

    def here(text):
        return text.replace("8002", str(port)).replace("/cache", str(tmp_path / "cache"))

    environment = {each["name"]: here(each["value"]) for each in sidecar["env"]}
    python, *words = map(here, [*sidecar["command"], *sidecar["args"]])
    assert python == "python3"
    vllm = subprocess.Popen(
        [str(vllm_python), *words],
        env=os.environ | environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),  # noqa: PLW1509
    )
    serve = None
    try:
        probe = [*map(here, sidecar["startupProbe"]["exec"]["command"][1:])]
        deadline = time.monotonic() + TIMEOUT * 4
        while subprocess.run([sys.executable, *probe], capture_output=True, check=False).returncode:
            assert vllm.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        told = {"CWPO_ANNOTATOR", "CWPO_BACKEND", "CWPO_VLLM_URL"}
        given = {e["name"]: here(e["value"]) for e in service["env"] if e["name"] in told}
        assert given.keys() == told
        serve = subprocess.Popen(
            [sys.executable, "-m", "cwpo", "serve", "--port", "0", "--dtype", "float32"],
            env=os.environ | given,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )
        triplet = Triplet(prompt="why", response_a="because", response_b="no")
        with Client(url_in(serve.stdout.readline())) as client:
            (label,) = client.annotate([triplet]).annotations
        (expected,) = Annotator.load(folder, dtype="float32").annotate([triplet])
        assert label.score_a == pytest.approx(expected.score_a, abs=2e-4)
        assert label.score_b == pytest.approx(expected.score_b, abs=2e-4)
    finally:
        for process in (serve, vllm):
            if process is not None:
                process.terminate()
                process.wait()
