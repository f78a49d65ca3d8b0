"""Uploading the finished model, to a Hub of our own that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import ModelCard

from ..samples import weighted, write_lines

REPOSITORY = "owner/cw-dpo"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload of small files takes."""

    created: list[dict]
    files: dict[str, bytes]
    mistakes: list[dict[str, str]]

    def do_GET(self):
        self.answer({"name": "owner", "auth": {}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_test"
        if self.path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/{REPOSITORY}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": Hub.mistakes, "warnings": []}, 400 if Hub.mistakes else 200)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                {
                    "files": [
                        {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for name in names
                    ]
                }
            )
        else:
            assert f"/api/models/{REPOSITORY}/commit/" in self.path, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{REPOSITORY}/commit/0",
                    "commitOid": "0" * 40,
                }
            )

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.created, Hub.files, Hub.mistakes = [], {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def with_hub(hub, *words):
    """A Python of its own, since where the Hub is gets read when its library is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "weights"),
    [((), "model.safetensors"), (("--lora", "--adapter-only"), "adapter_model.safetensors")],
)
def test_the_finished_model_is_uploaded(more, weights, hub, tiny_causal, tmp_path):
    output = tmp_path / "cw-dpo"
    data = write_lines(tmp_path / "weighted.jsonl", weighted(8))
    flags = ("--model", tiny_causal, "--data", data, "--output", output, "--threads", 1)
    words = map(str, (*flags, *more, "--max-steps", 1, "--push-to-hub", REPOSITORY))
    done = with_hub(hub, "-m", "cwpo_trainer.align", *words)
    assert done.returncode == 0, done.stderr
    (created,) = Hub.created
    assert (created["name"], created["organization"]) == ("cw-dpo", "owner")
    assert created.get("private") or created.get("visibility") == "private"
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    assert Hub.files == written
    assert weights in written
    card = ModelCard(Hub.files["README.md"].decode())
    assert {"cwpo", "trl", "cw-dpo"} <= {*card.data.tags}
    # The repository is what its code loads.
    assert f'from_pretrained("{REPOSITORY}"' in card.text
    assert str(tmp_path) not in str(card)
    # An adapter without its base model is of no use to others.
    assert ("base model is the folder" in done.stderr) == bool(more)
    assert not [name for name in written if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.slow
def test_a_card_that_the_hub_refuses_is_named(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mine\n---\n# A policy\n")
    Hub.mistakes = [{"message": '"license" must be one of the known ones'}]
    code = (
        "from pathlib import Path\n"
        "from cwpo.errors import CwpoError\n"
        "from cwpo_trainer.policy.saving import push\n"
        "try:\n"
        f"    push(Path({str(tmp_path)!r}), {REPOSITORY!r})\n"
        "except CwpoError as error:\n"
        "    print(error)\n"
    )
    done = with_hub(hub, "-c", code)
    assert '"license" must be one of the known ones' in done.stdout, done.stderr
    assert "is complete, but the upload" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not Hub.files
