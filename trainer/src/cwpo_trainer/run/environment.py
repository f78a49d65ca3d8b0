"""What the C libraries of a process that trains on a CPU read as it starts."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

# For the aligned address of a tensor, glibc takes a larger block and frees what lies before and
# behind. It keeps such small pieces aside, for the next small request, so that a tensor that is
# freed does not become one with them again, and is too small for the next of its size. A training
# then holds up to 1.6 times the memory that it uses. Without these caches it does not, and is as
# fast.
_HEAP = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}
# A thread that is done with its part of an operation waits for the others in a loop, by default for
# milliseconds. Where another program runs on one of the cores, it so takes the core that the last
# thread needs. With a short loop nothing is slower that has the cores for itself.
_WAITING = {"GOMP_SPINCOUNT": "1000"}


def start_anew(config: Path | None = None) -> None:
    """Start this command anew, with variables that can only be set before a process starts.

    Nothing happens on systems without glibc, where the variables are set already, and in a process
    that does more than to run a command, such as a notebook.

    Args:
        config: the file of settings that has been read; a pipe could not be read again.
    """
    is_glibc = platform.libc_ver()[0] == "glibc"
    unset = {name: value for name, value in _wanted().items() if name not in os.environ}
    if not is_glibc or not unset or not _runs_a_command():
        return
    if config is not None and not config.is_file():
        return
    os.environ.update(unset)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - the command of this very process


def _wanted() -> dict[str, str]:
    # Who has said how threads wait is not contradicted.
    return _HEAP if "OMP_WAIT_POLICY" in os.environ else _HEAP | _WAITING


def _runs_a_command() -> bool:
    """Whether this process is `cwpo`, or `python -m` one of our modules."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec is not None else Path(getattr(main, "__file__", None) or "").stem
    return name.split(".")[0] in {"cwpo", "cwpo_trainer"}
