"""What the service logs, and what it never does: the texts that it is sent."""

import gzip
import json
import os
import subprocess
import sys
from hashlib import sha256

import httpx2
import pytest

from harness import TIMEOUT, url_in

SECRET = "xyzzy-my-medical-history"
TRIPLET = {"prompt": f"{SECRET}?", "response_a": f"{SECRET}!", "response_b": "no"}

# A service whose backend fails with a message that quotes what it was given.
PROGRAM = """
import sys
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo.types import ModelRef
from cwpo_service.commands import Serve
from cwpo_service.scoring import loading

class Telling(NullBackend):
    def score_texts(self, texts):
        raise ValueError(sys.argv[1])

class Encoder(NullEncoder):
    def encode_texts(self, items, truncation):
        if items[0].prompt == "bug":
            raise RuntimeError(items[0].response)
        return super().encode_texts(items, truncation)

loading.load_annotator = lambda settings: Annotator(
    Encoder(), Telling(), ModelRef(name="telling", revision="1")
)
Serve(backend="null").cli_cmd()
"""


@pytest.fixture(scope="module", params=["json", "text"])
def log(request, tmp_path_factory):
    """The format, and the log after requests of all kinds."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"carla:{sha256(b'open sesame').hexdigest()}\n")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, SECRET],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "CWPO_PORT": "0",
            "CWPO_LOG_FORMAT": request.param,
            "CWPO_LOG_LEVEL": "info",
            "CWPO_API_KEYS_FILE": str(keys),
        },
    )
    headers = {"Authorization": "Bearer open sesame", "Content-Type": "application/json"}
    try:
        url = url_in(process.stdout.readline())
        with httpx2.Client(base_url=url, headers=headers, timeout=TIMEOUT) as http:
            good = {"triplets": [TRIPLET, TRIPLET | {"response_a": ""}]}
            http.post("/annotate", json=good, headers={"X-Request-ID": "good-1"})
            http.post("/annotate", json={"triplets": [TRIPLET | {"id": 7, SECRET: SECRET}]})
            http.post("/annotate", content=f'{{"{SECRET}')
            http.post("/annotate", content=SECRET.encode(), headers={"Content-Encoding": "gzip"})
            packed = gzip.compress(json.dumps(good).encode())
            http.post("/annotate", content=packed, headers={"Content-Encoding": "gzip"})
            http.post("/annotate", json=good, headers={"Authorization": "Bearer wrong"})
            item = {"prompt": SECRET, "response": SECRET}
            http.post("/score", json={"items": [item]})
            http.post("/score", json={"items": [item | {"prompt": "bug"}]})
            http.post("/get_reward", json={"query": [SECRET], "prompts": [SECRET]})
            http.get(f"/nowhere/{SECRET}")
            http.get("/health/live")
    finally:
        process.terminate()
        _, stderr = process.communicate(timeout=TIMEOUT)
    return request.param, stderr


def test_no_text_of_a_client_is_logged(log):
    _, text = log
    assert "/annotate" in text
    assert SECRET not in text
    assert "open sesame" not in text


def test_every_answer_is_a_line_with_its_figures(log):
    format, text = log
    if format == "text":
        (line,) = [line for line in text.splitlines() if "request_id=good-1 " in line]
        assert " info answered " in line
        assert "key=carla method=POST route=/annotate status=200 seconds=0." in line
        return
    lines = [json.loads(line) for line in text.splitlines()]
    answers = [line for line in lines if line["logger"] == "cwpo_service.access"]
    # The probe is not among them.
    assert [line["status"] for line in answers] == [
        *(200, 422, 422, 400, 200, 401, 500, 500, 500, 404)
    ]
    good = answers[0]
    assert (good["request_id"], good["key"], good["method"]) == ("good-1", "carla", "POST")
    assert (good["route"], good["items"], good["tokens"]) == ("/annotate", 2, 2)
    stages = [good[f"{stage}_seconds"] for stage in ("tokenise", "queue", "inference")]
    assert 0 < sum(stages) < good["seconds"]
    assert answers[-1]["route"] == "unmatched"
    assert "key" not in answers[5]


def test_a_failure_is_logged_by_its_kind_and_stack(log):
    format, text = log
    if format == "text":
        assert "a batch of 1 items failed (ValueError)\n" in text
        return
    lines = [json.loads(line) for line in text.splitlines()]
    (batch, *_) = [line for line in lines if line.get("exception") == "ValueError"]
    assert "score_texts" in batch["stack"]
    assert any("RuntimeError" in line["message"] for line in lines if line["level"] == "error")
