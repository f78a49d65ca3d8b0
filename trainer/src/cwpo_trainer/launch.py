"""A command as one of the processes that torchrun starts, down to how the process ends."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from cwpo import cli
from cwpo_trainer import runtime


def main(command: type[cli.Command], program: str) -> None:
    """Run the command with the flags of this process.

    Exits: as `cwpo.cli.run` does.
    """
    if runtime.world_size() == 1:
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
    """End this process with all of its exit handlers, but without taking the interpreter down.

    The threads of a process group outlive it where a model still refers to it; one that lets go of
    its last tensor while the interpreter is taken down aborts the process, whose work was done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
