"""A Hub of the tests, which keeps what it is sent."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

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
            assert re.search(rf"/api/(models|datasets)/{REPOSITORY}/commit/", self.path), self.path
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
