"""A real vLLM server scores as Hugging Face does, and its death is noticed and mended."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest

from cwpo import Client, Triplet
from cwpo.errors import CwpoError
from cwpo_annotator import Annotator
from cwpo_annotator.backends.vllm.server import VllmServer
from harness import TIMEOUT, lives, url_in

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "preferences.jsonl"
TRIPLETS = [
    Triplet(**{name: row[name] for name in ("id", "prompt", "response_a", "response_b")})
    for row in map(json.loads, SAMPLE.read_text().splitlines()[:8])
]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@contextmanager
def vllm(python, folder):
    server = VllmServer(python, folder, dtype="float32", on_cpu=True)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_scores_equal_hugging_face_and_another_model_is_noticed(
    vllm_python, scalar_head, tiny_annotator, hugging_face_scores
):
    folder = scalar_head("smollm2")
    with vllm(vllm_python, folder) as server:
        annotator = Annotator.over_vllm(folder, server.url, dtype="float32")
        expected = hugging_face_scores(folder, annotator.encode(TRIPLETS))
        labels = annotator.annotate(TRIPLETS)
        scores = [(label.score_a, label.score_b) for label in labels]
        np.testing.assert_allclose(scores, expected, atol=2e-4)
        assert [label.id for label in labels] == [triplet.id for triplet in TRIPLETS]
        with pytest.raises(CwpoError, match="known texts"):
            Annotator.over_vllm(tiny_annotator, server.url, dtype="float32")


def test_serve_starts_vllm_and_starts_it_again_when_it_dies(vllm_python, scalar_head):
    folder = scalar_head("smollm2")
    command = [sys.executable, "-m", "cwpo", "serve", "--annotator", str(folder)]
    command += ["--backend", "vllm", "--vllm-python", vllm_python, "--device", "cpu"]
    command += ["--dtype", "float32", "--port", "0"]
    service = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        line = service.stdout.readline()
        assert "vllm" in line
        url = url_in(line)
        triplet = Triplet(prompt="why", response_a="because", response_b="no")
        with Client(url) as client:
            first = client.annotate([triplet]).annotations
            (here,) = Annotator.load(folder, dtype="float32").annotate([triplet])
            assert first[0].score_a == pytest.approx(here.score_a, abs=2e-4)
            assert first[0].score_b == pytest.approx(here.score_b, abs=2e-4)
            children = psutil.Process(service.pid).children(recursive=True)
            for child in children:
                child.send_signal(signal.SIGKILL)
            assert httpx2.get(f"{url}/health/ready", timeout=TIMEOUT).status_code == 503
            while not httpx2.get(f"{url}/health/ready", timeout=TIMEOUT).is_success:
                assert service.poll() is None
            assert client.annotate([triplet]).annotations == first
            children = psutil.Process(service.pid).children(recursive=True)
    finally:
        service.terminate()
        service.wait(TIMEOUT)
    _, left = psutil.wait_procs(children, timeout=TIMEOUT)
    assert not [child for child in left if lives(child)]
