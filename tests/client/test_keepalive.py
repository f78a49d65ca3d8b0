"""A machine that goes silent is given up long before its answer would be due."""

import subprocess
import sys
import threading

import pytest

from cwpo import Client
from cwpo.errors import ConnectionFailedError
from harness import TIMEOUT
from machines import network

# Says when it can be reached and when it has a request, and never answers.
SILENT = """
import signal
import socket
with socket.create_server(("0.0.0.0", 8000)) as listener:
    print("listening", flush=True)
    connection, _ = listener.accept()
    connection.recv(1)
    print("asked", flush=True)
    signal.pause()
"""


@pytest.fixture
def machine():
    with network() as machines:
        yield machines.add("silent")


@pytest.mark.chaos
@pytest.mark.slow
def test_a_service_whose_machine_goes_silent_is_given_up(machine):
    server = machine.start([sys.executable, "-c", SILENT], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "listening\n"
    failures = []

    def ask():
        with Client(f"http://{machine.address}:8000", timeout=1800, max_retries=0) as client:
            try:
                client.model()
            except ConnectionFailedError as error:
                failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert server.stdout.readline() == "asked\n"
    machine.go_silent()
    asking.join(TIMEOUT)
    assert len(failures) == 1
