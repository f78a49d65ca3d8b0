"""Each benchmark starts; what it measures is looked at by who runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    "against",
    "annotator",
    "fairness",
    "hostile",
    "jobs",
    "labels",
    "ledger",
    "service",
    "token_files",
    "train",
    "utilisation",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_tells_its_options(name):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--help"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_every_script_is_among_them():
    scripts = {
        path.stem for path in BENCHMARKS.glob("*.py") if "ArgumentParser" in path.read_text()
    }
    assert scripts == set(NAMES)
