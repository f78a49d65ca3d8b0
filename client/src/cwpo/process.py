"""Settings of a process: its end with its parent, ports, garbage collection."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None] | None:
    """A preexec_fn for Popen that makes Linux end the child when its parent ends for any reason.

    Linux takes the thread that starts the child for the parent, so start the child in a thread that
    lives as long as the child should.
    """
    if not sys.platform.startswith("linux"):
        return None
    parent = os.getpid()
    # Loaded here: between fork and exec only the call itself is safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def free_port() -> int:
    """A port of the loopback interface that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def collect_garbage_rarely() -> None:
    """Search for reference cycles after 50,000 new objects instead of Python's default of 700.

    Rows and requests create many objects but no cycles; the default doubles the time of a task.
    """
    gc.set_threshold(50_000, 20, 100)
