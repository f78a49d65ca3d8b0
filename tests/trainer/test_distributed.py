"""What several processes, or smaller batches, compute is what one process computes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cwpo_trainer.commands import Align

from .launching import assert_policies_alike
from .samples import weighted, write_lines

pytestmark = pytest.mark.slow


def launched(processes, *arguments):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
    words = map(str, (sys.executable, *launch, *arguments))
    done = subprocess.run([*words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_fsdp2_over_two_processes_follows_one(tiny_causal, tmp_path):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(8))
    worker = Path(__file__).with_name("fsdp_worker.py")
    for processes in (1, 2):
        launched(processes, worker, tiny_causal, data, tmp_path / f"{processes}.pt")
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert two["sharded"]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["losses"][1] < one["losses"][0]
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [(), ("--lora",)])
def test_eight_at_once_follow_one_at_a_time(lora, tiny_causal, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(24))
    for name, size, accumulation in (("many", 8, 1), ("single", 1, 8)):
        command(
            Align,
            *("--model", tiny_causal, "--data", data, "--output", tmp_path / name, *lora),
            *("--batch-size", size, "--gradient-accumulation", accumulation),
            *("--epochs", 1, "--learning-rate", 1e-3, "--dtype", "float32"),
        )
    assert_policies_alike(tmp_path / "many", tmp_path / "single")
