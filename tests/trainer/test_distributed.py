"""What several processes, or smaller batches, compute is what one process computes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cwpo_trainer.commands import Align
from cwpo_trainer.run.folder import read_lines

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


@pytest.mark.parametrize(
    "more", [(), ("--lora", "--gradient-checkpointing"), ("--precompute-reference",)], ids=" ".join
)
def test_packed_rows_of_two_processes_follow_one(more, tiny_causal, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(24))
    common = ("--model", tiny_causal, "--data", data, "--gradient-accumulation", 1, *more)
    common = (*common, "--epochs", 1, "--learning-rate", 1e-3, "--dtype", "float32")
    command(Align, *common, "--batch-size", 8, "--output", tmp_path / "one")
    align = ("-m", "cwpo_trainer.align", *common, "--batch-size", 4, "--output", tmp_path / "two")
    assert "read by itself" not in launched(2, *align)
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("more", [(), ("--lora",), ("--loss", "simpo")], ids=" ".join)
def test_fsdp2_of_two_processes_follows_one(more, tiny_causal, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(24))
    common = ("--model", tiny_causal, "--data", data, "--gradient-accumulation", 1, *more)
    common = (*common, "--epochs", 1, "--learning-rate", 1e-3, "--dtype", "float32")
    command(Align, *common, "--batch-size", 8, "--output", tmp_path / "one")
    worker = Path(__file__).with_name("fsdp2_on_cpus.py")
    common = (*common, "--sharding", "fsdp2", "--batch-size", 4, "--output", tmp_path / "two")
    assert "read by itself" not in launched(2, worker, "align", *common)
    assert_alike(tmp_path / "one", tmp_path / "two")


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
    assert_alike(tmp_path / "many", tmp_path / "single")


def assert_alike(folder, other):
    """Two runs of three steps logged the same, and gave the same weights."""
    runs = [read_lines(of / "training.jsonl") for of in (folder, other)]
    assert [*map(len, runs)] == [3, 3]
    for left, right in zip(*runs, strict=True):
        for key in ("loss", "unweighted_loss", "weight", "rewards/margins"):
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-5), key
    left, right = (AutoModelForCausalLM.from_pretrained(of) for of in (folder, other))
    for name, value in left.state_dict().items():
        torch.testing.assert_close(value, right.get_parameter(name), rtol=1e-3, atol=1e-5)
