"""The number of threads that a model uses on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def use_threads(threads: int | None) -> None:
    """Set the number of threads that torch uses in the whole process.

    Args:
        threads: None uses best_threads(), but no more than torch is set to already.
    """
    torch.set_num_threads(threads or min(torch.get_num_threads(), best_threads()))


def best_threads() -> int:
    """The physical cores that this process may use.

    A core's second hardware thread has no arithmetic units of its own, and threads beyond a
    container's quota wait for one another. OMP_NUM_THREADS overrides this number, if it is set.
    """
    wish = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    return max(1, min(_cores(_allowed()), _share()))


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores(cpus: set[int]) -> int:
    """Physical cores behind the logical processors; each its own where the system does not say."""
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add((_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def _share() -> int:
    """Whole processors of the container's quota, which it may not exceed on average."""
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1
