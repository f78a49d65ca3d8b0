"""Child processes that must not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None] | None:
    """A preexec_fn for Popen: Linux then ends the child with its parent, however that ends.

    The parent is the thread that starts the child: start it from one that lives as long as it.
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
    """A port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
