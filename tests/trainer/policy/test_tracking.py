"""What the trackers of --report-to were given, read back from the files that they keep."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec

import pytest

from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.run.folder import read_lines

from ..samples import weighted, write_lines

STEPS = 2
LOGGED = ("loss", "unweighted_loss", "weight", "rewards/margins", "logps/chosen", "num_tokens")


@pytest.fixture
def flags(tiny_causal, tmp_path, monkeypatch):
    # Trackers leave folders where they are run.
    monkeypatch.chdir(tmp_path)
    data = write_lines(tmp_path / "weighted.jsonl", weighted(16))
    return (
        *("--model", tiny_causal, "--data", data, "--batch-size", 4, "--max-steps", STEPS),
        *("--threads", 1),
        *("--gradient-accumulation", 1, "--learning-rate", 1e-3, "--dtype", "float32"),
    )


def assert_arrived(steps, output):
    """The tracker has each step's values as training.jsonl has them."""
    lines = read_lines(output / "training.jsonl")
    assert len(steps) == len(lines) == STEPS
    for of_tracker, line in zip(steps, lines, strict=True):
        for name in LOGGED:
            assert of_tracker[f"train/{name}"] == pytest.approx(line[name], rel=1e-5), name
        assert line["loss"] < line["unweighted_loss"]


def test_tensorboard_gets_the_log(flags, tmp_path, command):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "out"
    command(Align, *flags, "--report-to", "tensorboard", "--output", output)
    (folder,) = (output / "tensorboard").iterdir()
    board = events.EventAccumulator(str(folder)).Reload()
    values = {name: board.Scalars(f"train/{name}") for name in LOGGED}
    steps = [{f"train/{name}": values[name][at].value for name in LOGGED} for at in range(STEPS)]
    assert_arrived(steps, output)


def test_trackio_gets_the_log(flags, tmp_path):
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    output = tmp_path / "cw-dpo"
    # It reads where to write once, when it is imported.
    words = map(str, (*flags, "--report-to", "trackio", "--output", output))
    subprocess.run(
        [sys.executable, "-m", "cwpo_trainer.align", *words],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        check=True,
    )
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, metrics FROM metrics ORDER BY step")
    names, steps = zip(*((name, json.loads(metrics)) for name, metrics in rows), strict=True)
    assert set(names) == {"cw-dpo"}
    assert_arrived([step for step in steps if "train/loss" in step], output)


def wandb_records(path):
    """The records of an offline run: a log in blocks, in which long records stand in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header, whole_or_last = 32768, 7, (1, 4)
    data, at, record = path.read_bytes(), header, b""
    while at + header < len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + header : at + header + length]
        at += header + length
        if kind in whole_or_last:
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_gets_the_log_offline(flags, tmp_path, command, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "cw-dpo"
    try:
        command(Align, *flags, "--report-to", "wandb", "--output", output)
    finally:
        wandb.teardown()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(log))
    assert {record.run.display_name for record in records if record.HasField("run")} == {"cw-dpo"}
    steps = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.HasField("history")
    ]
    assert_arrived([step for step in steps if "train/loss" in step], output)


def test_nobody_logged_in_to_wandb_is_noticed_before_the_model(
    flags, tmp_path, failure, monkeypatch
):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    message = failure(
        Sft, *flags, "--model", "not-even-looked-for", "--report-to", "wandb", "--output", "out"
    )
    assert "No API key" in message
    assert "WANDB_MODE=offline" in message
