"""The demo itself, from end to end, on models small enough for a test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pyarrow.parquet as pq
import pytest

from harness import TIMEOUT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def command(tiny_causal, run):
    return [
        sys.executable, "examples/demo.py", "--model", str(tiny_causal), "--policy",
        str(tiny_causal), "--run", str(run), "--max-pairs", "60", "--annotator-epochs", "1",
        "--steps", "2", "--prompts", "2",
    ]  # fmt: skip


def started(words):
    """The demo in a session of its own, which Ctrl-C reaches."""
    return subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in a shell's background hands an ignored SIGINT down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def processes_of(run):
    """Command lines of living processes that belong to the run's service."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            where = os.readlink(folder / "cwd")
        except OSError:
            continue
        if str(run).encode() in environment or str(run) in line + where:
            found.append(line)
    return found


def test_the_models_are_unpacked_without_bars(tmp_path):
    run = [sys.executable, "examples/models.py", "minilm", "smollm2", "--into", str(tmp_path)]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        f"Unpacking the model minilm into {tmp_path / 'minilm'}",
        str(tmp_path / "minilm"),
        f"Unpacking the model smollm2 into {tmp_path / 'smollm2'}",
        str(tmp_path / "smollm2"),
    ]


def test_the_demo_closes_the_loop(tiny_causal, tmp_path):
    run = tmp_path / "run"
    result = subprocess.run(
        command(tiny_causal, run), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    unlabelled = (run / "splits" / "unlabelled.jsonl").read_text().splitlines()
    table = pq.read_table(run / "weighted.parquet")
    assert table.column_names == [
        "id", "prompt", "chosen", "rejected", "confidence", "score_chosen", "score_rejected",
        "preferred",
    ]  # fmt: skip
    assert table["id"].to_pylist() == [json.loads(line)["id"] for line in unlabelled]
    lines = [json.loads(line) for line in (run / "weighted.jsonl").read_text().splitlines()]
    assert lines == table.to_pylist()
    card = json.loads((run / "annotator" / "annotator.json").read_text())
    held_out = (run / "splits" / "held_out.jsonl").read_text().splitlines()
    assert card["held_out"]["pairs"] == len(held_out) > 0
    report = (run / "report.html").read_text()
    assert report.count("<svg") + report.count("data:image") >= 3
    assert str(run / "report.html") in result.stdout.replace("\n", "")
    assert processes_of(run) == []
    told = result.stdout.splitlines()[-1]
    page = "http://127.0.0.1:8000"
    command_line = f"cwpo up --annotator {run}/annotator --port 8000 --data-dir {run}/state"
    assert told == f"The service's page, {page}: {command_line}"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_stops_everything_the_demo_started(tiny_causal, tmp_path):
    run = tmp_path / "run"
    demo = started(command(tiny_causal, run))
    for line in demo.stdout:
        if line.startswith("ready at"):
            break
    assert any("valkey" in line for line in processes_of(run))
    os.killpg(demo.pid, signal.SIGINT)
    output = demo.stdout.read()
    assert demo.wait() != 0
    assert "interrupted" in output
    wait_until_gone(run)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_demo_can_leave_its_service_up_until_ctrl_c(tiny_causal, tmp_path):
    run = tmp_path / "run"
    demo = started([*command(tiny_causal, run), "--keep"])
    for line in demo.stdout:
        if line.startswith("The service's page: "):
            break
    page = next(word for word in line.split() if word.startswith("http://")).rstrip(".")
    assert httpx2.get(f"{page}/health/ready").status_code == 200
    os.killpg(demo.pid, signal.SIGINT)
    output = demo.stdout.read()
    assert demo.wait() == 0
    assert output.endswith("service, worker and Valkey stopped\n")
    wait_until_gone(run)


def wait_until_gone(run):
    deadline = time.monotonic() + TIMEOUT
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(run) == []
