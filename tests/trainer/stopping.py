"""Trainings that SIGTERM stops."""

from __future__ import annotations

import subprocess
import sys

from cwpo.exit_codes import ExitCode

# A thread of the process itself sends the signal: to another process the system may give no time
# before so short a training has ended.
_PROGRAM = """
import os, runpy, signal, sys, threading, time
from pathlib import Path
from cwpo_trainer.run.folder import read_lines

log, step, module = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[:3]

def stop():
    while len(read_lines(log)) < step:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=stop, daemon=True).start()
runpy.run_module(module, run_name="__main__")
"""


def stopped_after(step, log, module, *arguments, processes=1) -> str:
    """What `python -m module` printed to stderr; it was stopped when its log had so many steps.

    Several processes are started by torchrun, which has an exit code of its own.
    """
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes)
    start = (*launch, "--no-python") if processes > 1 else ()
    command = [*start, sys.executable, "-c", _PROGRAM, log, step, module, *arguments]
    done = subprocess.run([*map(str, command)], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == (ExitCode.STOPPED if processes == 1 else 1), done.stderr
    return done.stderr
