"""The notebook, run as a script, on models small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_goes_from_labels_to_a_report(tiny_causal, tmp_path):
    models = ("--weak", tiny_causal, "--strong", tiny_causal)
    notebook = [sys.executable, "examples/notebooks/cw_po.py", "--", *models, "--steps", "1"]
    subprocess.run([*notebook, "--run", tmp_path], cwd=ROOT, check=True)
    assert pq.read_metadata(tmp_path / "weighted.parquet").num_rows == 250
    adapter = json.loads((tmp_path / "cw-dpo" / "adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA"
    assert "cw-dpo" in (tmp_path / "report.html").read_text()
