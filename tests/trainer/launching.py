"""Runs in two processes, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cwpo_annotator.checkpoint import read_card
from cwpo_trainer.run.folder import read_lines

IN_TURN = (Path(__file__).with_name("in_turn.py"),)


def launched(program, *arguments):
    """A run of a program in two processes."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2)
    return subprocess.run(
        [*map(str, (*launch, *program, *arguments))],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        text=True,
    )


def in_two_processes(root, runs):
    """Runs commands in turn, each with its own folder of `root` as output.

    Args:
        runs: by name: the command, its flags, and the tokens that the second process has memory
            for, or None.
    """
    given = [
        {
            "name": name,
            "command": command,
            "flags": [*map(str, (*flags, "--output", root / name))],
            "tokens": tokens,
        }
        for name, (command, flags, tokens) in runs.items()
    ]
    (root / "runs.json").write_text(json.dumps(given))
    done = launched(IN_TURN, root)
    assert done.returncode == 0, done.stderr


def said(root, name):
    """What both processes printed in a run, with their exit codes at the end."""
    return [(root / f"{name}.{rank}.txt").read_text() for rank in (0, 1)]


def assert_policies_alike(folder, other):
    """Two runs of three steps, at a rate of 1e-3, logged the same, and gave the same weights."""
    runs = [read_lines(of / "training.jsonl") for of in (folder, other)]
    assert [*map(len, runs)] == [3, 3]
    for left, right in zip(*runs, strict=True):
        for key in ("loss", "unweighted_loss", "weight", "rewards/margins"):
            if key in left:
                assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-5), key
    left, right = (AutoModelForCausalLM.from_pretrained(of) for of in (folder, other))
    for name, value in left.state_dict().items():
        torch.testing.assert_close(value, right.get_parameter(name), rtol=1e-3, atol=1e-4)


def assert_same_weights(left, right, **tolerance):
    """Two folders have the same weights: exactly, if there is no tolerance."""
    left, right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert left.keys() == right.keys()
    for name, value in left.items():
        if tolerance:
            torch.testing.assert_close(value, right[name], **tolerance)
        else:
            assert torch.equal(value, right[name]), name


def assert_annotators_alike(one, two):
    """Two annotators of the same steps, up to rounding."""
    for log in ("training.jsonl", "sft.jsonl"):
        lines, others = (read_lines(path / log) for path in (one, two))
        for left, right in zip(lines, others, strict=True):
            assert left.keys() == right.keys()
            for key, value in left.items():
                assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert_same_weights(one, two, rtol=1e-3, atol=2e-4)
    if (one / "reference").exists():
        assert_same_weights(one / "reference", two / "reference", rtol=1e-3, atol=2e-4)
    assert read_card(one).temperature == pytest.approx(read_card(two).temperature, rel=1e-2)
