"""What millions of pairs cost before the first step: of a run that tokenises them, and resumed.

Short pairs of random words, with the tokenizer of SmolLM2 without its chat template and a model of
two small layers, so that what is measured is the data. Each run is a process of its own, which is
stopped by SIGTERM after its first step, and leaves a checkpoint; the second one resumes from it.
Its memory is VmHWM of Linux.

Example:
    python benchmarks/token_files.py --pairs 10000000
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measurement
import pyarrow as pa
import pyarrow.parquet as pq

from cwpo.exit_codes import ExitCode

RESULTS = measurement.RESULTS / "token_files.json"
_WRITTEN_AT_ONCE = 100_000
# Between two looks at the log of a run.
_POLL_SECONDS = 0.05


def main() -> None:
    """Print the figures and write benchmarks/results/token_files.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, model = write_pairs(Path(folder), options.pairs), small_model(Path(folder))
        command = align(model, data, Path(folder) / "run")
        figures = {
            "first": first_step(command, Path(folder)),
            "resumed": first_step([*command, "--resume"], Path(folder)),
        }
        megabytes = (
            sum(path.stat().st_size for path in Path(folder, "cache").rglob("*.arrow")) / 1e6
        )
    for run, found in figures.items():
        print(f"{run} run: " + ", ".join(f"{name} {value:,}" for name, value in found.items()))
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": measurement.machine(
            ("cwpo-trainer", "datasets", "torch", "trl"), load_average=os.getloadavg()
        ),
        "pairs": options.pairs,
        "token_file_mb": round(megabytes),
        **figures,
    }
    measurement.write(options.output, record)


def write_pairs(folder: Path, count: int) -> Path:
    """A weighted dataset of short pairs."""
    draw = random.Random(0)
    words = [
        "why",
        "does",
        "water",
        "look",
        "so",
        "blue",
        "when",
        "the",
        "day",
        "is",
        "long",
        "and",
        "people",
        "call",
        "it",
        "a",
        "number",
    ]
    path = folder / "pairs.parquet"
    names = ("id", "prompt", "chosen", "rejected", "confidence")
    kinds = (pa.string(), pa.string(), pa.string(), pa.string(), pa.float32())
    schema = pa.schema(zip(names, kinds, strict=True))
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, _WRITTEN_AT_ONCE):
            rows = range(start, min(start + _WRITTEN_AT_ONCE, count))
            texts = [[" ".join(draw.choices(words, k=8)) for _ in rows] for _ in range(2)]
            columns = (
                [str(row) for row in rows],
                [f"question {row}" for row in rows],
                texts[0],
                [f"not {text}" for text in texts[1]],
                [0.1 + 0.8 * draw.random() for _ in rows],
            )
            writer.write_table(pa.table(dict(zip(names, columns, strict=True)), schema))
    return path


def small_model(folder: Path) -> Path:
    """Two layers with the tokenizer of SmolLM2, without its template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(measurement.backbone("smollm2"))
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = folder / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model


def align(model: Path, data: Path, output: Path) -> list[str]:
    """The command of a run that logs each of its steps."""
    flags = ("--model", model, "--data", data, "--output", output, "--logging-steps", 1)
    flags = (*flags, "--batch-size", 8, "--gradient-accumulation", 1, "--save-steps", 0)
    return [sys.executable, "-m", "cwpo", "align", *map(str, flags)]


def first_step(command: list[str], folder: Path) -> dict[str, Any]:
    """Seconds until the run has done a step, and MB at the peak; it is stopped after that."""
    log = folder / ".run.partial" / "training.jsonl"
    before = lines(log)
    begun = time.perf_counter()
    run = subprocess.Popen(command, env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")})
    while lines(log) == before and run.poll() is None:
        time.sleep(_POLL_SECONDS)
    seconds = time.perf_counter() - begun
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{run.pid}/status").read_text())
    run.terminate()
    if run.wait() != ExitCode.STOPPED:
        sys.exit(f"the run ended with {run.returncode} rather than with a checkpoint")
    return {"seconds": round(seconds, 1), "peak_mb": round(int(peak) * 1024 / 1e6)}


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


if __name__ == "__main__":
    main()
