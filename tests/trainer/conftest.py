from __future__ import annotations

import pytest

from cwpo.cli import run as run_command


@pytest.fixture
def command():
    """Runs a Command with flags, as `cwpo NAME` does."""

    def run(kind, *arguments):
        run_command(kind, [str(argument) for argument in arguments], f"cwpo {kind.__name__}")

    return run
