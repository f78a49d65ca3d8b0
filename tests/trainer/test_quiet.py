"""Without a terminal, stderr holds the progress of the work and nothing that is not ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from .samples import pairs, weighted, write_lines

PROGRESS = re.compile(r"[\w, -]+: [\d,]+( of [\d,]+)? (steps|pairs|answers|texts|rows)\b.*")
NOTE = re.compile(r"answers end with <\|end\|>, as the chat template writes them, not with .*")
SMALL = ("--max-steps", "2", "--batch-size", "4", "--threads", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("sft", ("--gradient-accumulation", "1")),
        ("align", ("--gradient-accumulation", "1", "--lora", "--precompute-reference")),
        ("train_annotator", ("--validation-fraction", "0")),
    ],
)
def test_a_start_prints_no_warnings_of_libraries(module, more, tiny_causal, tmp_path):
    rows = pairs(16) if module == "train_annotator" else weighted(16)
    data = write_lines(tmp_path / "data.jsonl", rows)
    flags = ("--model", tiny_causal, "--data", data, "--output", tmp_path / "out", *SMALL, *more)
    done = subprocess.run(
        [sys.executable, "-m", f"cwpo_trainer.{module}", *map(str, flags)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not (PROGRESS.fullmatch(line) or NOTE.fullmatch(line))] == []
    steps = [line for line in lines if re.search(r"2 of 2 steps, loss \d", line)]
    assert len(steps) == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["results"]
