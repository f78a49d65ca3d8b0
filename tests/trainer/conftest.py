from __future__ import annotations

from http.server import ThreadingHTTPServer
from threading import Thread

import pytest

from cwpo import cli

from .hub import Hub


@pytest.fixture
def command():
    """Runs a Command with flags, as `cwpo NAME` does."""

    def run(kind, *arguments):
        cli.run(kind, [str(argument) for argument in arguments], f"cwpo {kind.__name__}")

    return run


@pytest.fixture
def failure(command):
    """Runs a Command that has to fail, and gives the one line that it fails with."""

    def run(kind, *arguments):
        with pytest.raises(SystemExit) as stopped:
            command(kind, *arguments)
        message = str(stopped.value.code)
        assert message.count("\n") == 0
        return message

    return run


@pytest.fixture
def hub():
    Hub.created, Hub.files, Hub.mistakes = [], {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
