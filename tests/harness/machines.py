"""Machines of one network, as network namespaces of this machine: each can go silent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

# Networks that can be there at once, of tests in several processes.
NETWORKS = 16
# Files here take the place of those in /etc, for the processes of a namespace.
_OF_NAMESPACES = Path("/etc/netns")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Machine:
    """A machine with an address of its own, and the processes that were started on it."""

    def __init__(self, name: str, number: int, network: Machines) -> None:
        self._network = network
        self.name = f"{network.name}-{name}"
        self.address = f"{network.subnet}.{number}"
        self._near, self._far = f"{network.name}-n{number}", f"{network.name}-f{number}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def join(self) -> None:
        """Connect it to the bridge."""
        inside = ("ip", "netns", "exec", self.name)
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far)
        run("ip", "link", "set", self._near, "master", self._network.name, "up")
        run("ip", "link", "set", self._far, "netns", self.name)
        run(*inside, "ip", "addr", "add", f"{self.address}/24", "dev", self._far)
        run(*inside, "ip", "link", "set", self._far, "up")
        run(*inside, "ip", "link", "set", "lo", "up")

    def know(self, names: Mapping[str, str]) -> None:
        """Let its processes find machines by name, the address by name."""
        folder = _OF_NAMESPACES / self.name
        folder.mkdir(parents=True, exist_ok=True)
        hosts = {"localhost": "127.0.0.1"} | names
        (folder / "hosts").write_text("".join(f"{at} {name}\n" for name, at in hosts.items()))

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process on this machine; options as those of Popen."""
        process = subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)
        self.processes.append(process)
        return process

    def go_silent(self) -> None:
        """From now on nothing goes out and nothing comes in, and nobody is told."""
        run("ip", "netns", "exec", self.name, "ip", "link", "set", self._far, "down")

    def speak_again(self) -> None:
        run("ip", "netns", "exec", self.name, "ip", "link", "set", self._far, "up")

    def leave(self) -> None:
        """Kill its processes and remove it."""
        # With the children that they forked.
        for pid in _pids_in(self.name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()  # One that was started just now is not on the machine yet.
            process.wait()
        # The system removes a namespace, and what is in it, some time later.
        for thing in (("link", "del", self._near), ("netns", "del", self.name)):
            with suppress(subprocess.CalledProcessError):
                run("ip", *thing)
        shutil.rmtree(_OF_NAMESPACES / self.name, ignore_errors=True)


class Machines:
    """Machines that reach one another, and are reached from here.

    here: the address from which they are reached.
    """

    def __init__(self, number: int) -> None:
        self.name = f"cwpo{number}"
        self.subnet = f"10.231.{77 + number}"
        self.here = f"{self.subnet}.1"
        self._machines: list[Machine] = []

    def join(self) -> None:
        """Make the bridge between them. Raises: CalledProcessError where it is there already."""
        run("ip", "link", "add", self.name, "type", "bridge")
        run("ip", "addr", "add", f"{self.here}/24", "dev", self.name)
        run("ip", "link", "set", self.name, "up")

    def add(self, name: str) -> Machine:
        machine = Machine(name, len(self._machines) + 2, self)
        self._machines.append(machine)
        machine.join()
        return machine

    def leave(self) -> None:
        for machine in self._machines:
            machine.leave()
        run("ip", "link", "del", self.name)


@contextmanager
def network() -> Iterator[Machines]:
    """A network to add machines to; skips the test where none can be made."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and ip of iproute2")
    machines = _joined()
    try:
        yield machines
    finally:
        machines.leave()


def _joined() -> Machines:
    """The first network that is not there yet."""
    said = b""
    for number in range(NETWORKS):
        machines = Machines(number)
        try:
            machines.join()
        except subprocess.CalledProcessError as error:
            said = error.stderr
        else:
            return machines
    pytest.skip(f"no network can be made here: {said!r}")


def _pids_in(name: str) -> list[int]:
    found = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def clock(shift: str) -> dict[str, str]:
    """The environment of a process whose clock is off by `shift`, such as "+60s"."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("libfaketime is not installed")
    return {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME": shift,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
