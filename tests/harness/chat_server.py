"""An endpoint that speaks OpenAI's chat completions, whose replies a test writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@dataclass
class ChatServer:
    """What it does, and what it was asked.

    reply: to a question; failures: status, headers and body of the first answers; key: that it
    asks for; usage: tokens that each reply says it cost.
    """

    reply: Callable[[str], str]
    failures: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    key: str | None = None
    usage: dict[str, int] | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    @property
    def questions(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]

    def answer(self, path: str, key: str | None, body: dict[str, Any]):
        """Status, headers and body."""
        with self.lock:
            if path != "/v1/chat/completions":
                return 404, {}, {"error": {"message": f"no {path}"}}
            if self.key is not None and key != f"Bearer {self.key}":
                return 401, {}, {"error": {"message": "Incorrect API key"}}
            if self.failures:
                return self.failures.pop(0)
            self.requests.append(body)
        message = {"role": "assistant", "content": self.reply(body["messages"][0]["content"])}
        usage = {} if self.usage is None else {"usage": self.usage}
        return 200, {}, {"choices": [{"message": message}]} | usage


@contextmanager
def chat_server(reply: Callable[[str], str], **script: Any) -> Iterator[ChatServer]:
    """A server that listens; its `url` is what an SDK takes as the base URL."""
    chat = ChatServer(reply, **script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, answer = chat.answer(
                self.path, self.headers.get("Authorization"), body
            )
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
