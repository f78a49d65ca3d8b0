"""What older versions wrote, a folder a version.

0.1 was written by its commands on a Llama of one layer: two annotators trained on labelled.jsonl,
and what they say of the first rows of triplets.jsonl; the dataset that `cwpo annotate` made of
these with the first of them; a training of either kind that SIGTERM stopped after step 3, and what
its like came to undisturbed; and the data folder of a `cwpo up` that was killed, with a job that
had ended and one of the same rows with two of its five shards done and one under way.

There is no pickle among it. torch's own files (.pt) are kept as JSON and safetensors, and made
again by `old`. Those that a resumed run does not read are left out: what TRL says of its arguments,
and random states, of which an alignment without dropout makes no use.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of what 0.1 wrote, as the current folder: the paths in it are relative."""
    folder = tmp_path / "0.1"
    shutil.copytree(Path(__file__).parent / "0.1", folder)
    for path in folder.rglob("*.pt.json"):
        _write_torch_file(path)
    monkeypatch.chdir(folder)
    return folder


def _write_torch_file(described: Path) -> None:
    """The .pt file that a .pt.json describes; its tensors stand beside it in safetensors."""
    import torch
    from safetensors.torch import load_file

    beside = described.with_suffix(".safetensors")
    tensors = load_file(beside) if beside.is_file() else {}

    def value(of: Any) -> Any:
        if isinstance(of, list):
            return [value(item) for item in of]
        if not isinstance(of, dict):
            return of
        ((kind, content),) = of.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(map(value, content))
        return {key: value(item) for key, item in content}

    torch.save(value(json.loads(described.read_text())), described.with_suffix(""))
