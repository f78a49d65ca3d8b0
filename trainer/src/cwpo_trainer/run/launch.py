"""A command run as one of several processes that torchrun starts."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from cwpo import cli
from cwpo_trainer.run import process


def main(command: type[cli.Command], program: str) -> None:
    """Run the command with the flags of this process.

    Exits: as `cwpo.cli.run` does.
    """
    if process.world_size() == 1:
        cli.run(command, sys.argv[1:], program)
        return
    try:
        cli.run(command, sys.argv[1:], program)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    leave()


def leave(code: int = 0) -> NoReturn:
    """Run the exit handlers and end this process at once, without shutting Python down.

    Threads of a torch process group may outlive it; one that frees a tensor while Python shuts
    down aborts the process, although its work was done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
