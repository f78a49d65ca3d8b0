"""What a training command sets before its libraries load, as libgomp itself shows it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest

from ..samples import pairs, write_lines

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a system without glibc")


def shown_by_libgomp(tiny_causal, tmp_path, **variables):
    """The settings that OpenMP's library says it has, in the process of a training command."""
    data = write_lines(tmp_path / "pairs.jsonl", pairs(40))
    command = [sys.executable, "-m", "cwpo", "train-annotator", "--dry-run"]
    command += ["--model", str(tiny_causal), "--data", str(data), "--output", str(tmp_path / "out")]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"GLIBC_TUNABLES", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    }
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(re.findall(r"(\w+) = '(\w*)'", done.stderr))


def test_threads_leave_the_cores_to_others_while_they_wait(tiny_causal, tmp_path):
    assert shown_by_libgomp(tiny_causal, tmp_path)["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize(
    ("variables", "spins"),
    [({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": "77"}, "77")],
)
def test_what_the_user_says_of_waiting_is_kept(tiny_causal, tmp_path, variables, spins):
    assert shown_by_libgomp(tiny_causal, tmp_path, **variables)["GOMP_SPINCOUNT"] == spins
