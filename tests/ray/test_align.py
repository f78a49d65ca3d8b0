"""examples/ray/align.py on a real Ray trains as torchrun does."""

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from cwpo_trainer.run.folder import read_lines, read_record

PYTHON = os.environ.get("CWPO_RAY_PYTHON")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="CWPO_RAY_PYTHON is not set: make test-ray"),
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"chosen": "kind good help", "rejected": "rude bad", "score_chosen": 1.0,
           "score_rejected": 0.0, "preferred": "a"}  # fmt: skip
    lines = [
        {"prompt": f"question {number}?", "confidence": (number % 9 + 1) / 10} | row
        for number in range(240)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_workers_train_together_and_begin_again_where_one_is_lost(rows, tiny_causal, tmp_path):
    output = tmp_path / "aligned"
    words = [
        *(PYTHON, "examples/ray/align.py", "--workers", 2, "--storage", tmp_path / "ray"),
        *("--model", tiny_causal, "--data", rows, "--output", output, "--threads", 1),
        *("--batch-size", 2, "--gradient-accumulation", 1, "--save-steps", 5, "--resume"),
        *("--world-size", 2, "--max-steps", 200),
    ]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([*map(str, words)], cwd=ROOT, stdout=log, stderr=log)
    training = output.with_name(f".{output.name}.partial") / "training.jsonl"
    while not (training.exists() and len(read_lines(training)) > 8):
        assert run.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    lost = [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "cwpo_trainer.align" in (process.info["cmdline"] or ())
        and (process.info["environ"] or {}).get("RANK") == "1"
    ]
    for process in lost:
        process.kill()
    assert lost
    assert run.wait() == 0, (tmp_path / "log").read_text()
    assert [line["step"] for line in read_lines(output / "training.jsonl")] == [*range(1, 201)]
    assert read_record(output).settings["world_size"] == 2
