"""What millions of pairs cost before the first step: time and memory of a first and of a later run.

Short pairs of random words, with the tokenizer of SmolLM2 and a model of two small layers, so that
what is measured is the data. Each run is a process of its own, and ends after one step; its memory
is VmHWM of Linux.

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

RESULTS = measurement.RESULTS / "token_files.json"
_WRITTEN_AT_ONCE = 100_000
# Runs `cwpo` with its arguments, and prints the KiB that were resident at most.
_AND_TELL_THE_PEAK = """
import re, sys
from cwpo.cli import main
main()
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def main() -> None:
    """Print the figures and write benchmarks/results/token_files.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, model = write_pairs(Path(folder), options.pairs), small_model(Path(folder))
        figures = {run: measured(Path(folder), run, model, data) for run in ("first", "later")}
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
    """Two layers with the tokenizer of SmolLM2."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(measurement.backbone("smollm2"))
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


def measured(folder: Path, run: str, model: Path, data: Path) -> dict[str, Any]:
    """Seconds from the start of `cwpo align` to its end after a step, and MB at the peak."""
    output = folder / run
    flags = ("--model", model, "--data", data, "--output", output, "--max-steps", 1)
    flags = (*flags, "--batch-size", 8, "--gradient-accumulation", 1)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _AND_TELL_THE_PEAK, "align", *map(str, flags)],
        env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    (pairs,) = re.findall(r'"pairs": (\d+)', (output / "run.json").read_text())
    peak = int(done.stdout.split()[-1]) * 1024 / 1e6
    return {"pairs": int(pairs), "seconds": round(seconds, 1), "peak_mb": round(peak)}


if __name__ == "__main__":
    main()
