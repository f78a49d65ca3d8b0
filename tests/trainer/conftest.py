from __future__ import annotations

import pytest

from cwpo import cli


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
