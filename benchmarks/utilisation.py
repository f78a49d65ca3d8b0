"""The annotator's share of what the hardware can multiply, and what the rest of its time goes to.

At the shapes of models of 135M and 0.5B, with random weights, in bfloat16, on real pairs: the
floating-point operations of the matrix products, over the time, over the speed of one plain
product. On a GPU that is the model FLOPs utilisation.

    CWPO_DATA_DIR=FOLDER python benchmarks/utilisation.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import measurement
import torch
from annotator import DATASETS, machine, read
from flops import matrix_ceilings, utilisation
from measurement import RESULTS, timed
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, LlamaConfig

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.encoder import Encoder

# Of SmolLM2 and Qwen2.5: layers, width, heads, key heads, and the feed-forward layer's width.
SHAPES = {"135M": (30, 576, 9, 3, 1536), "0.5B": (24, 896, 14, 2, 4864)}
# Operations of a profile that are named.
PROFILED = 8
# On a CPU the annotator computes in threads of its own.
ALL_THREADS = torch.profiler._ExperimentalConfig(profile_all_threads=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--pairs", type=int, default=2000 if on_gpu else 12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", default=DATASETS[0], choices=DATASETS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    triplets = read(arguments.dataset, arguments.pairs)
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(
                with_random_weights(Path(folder) / shape, shape), shape, triplets, arguments.rounds
            )
            for shape in arguments.shapes
        ]
    show(results)
    record = {"command": " ".join(sys.argv), "machine": machine(), "results": results}
    measurement.write(arguments.results / "utilisation.json", record)
    print(f"written to {arguments.results / 'utilisation.json'}")


def with_random_weights(folder: Path, shape: str) -> Path:
    encoder = Encoder.create(measurement.backbone("smollm2"))
    layers, width, heads, key_heads, wide = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=wide,
        vocab_size=len(encoder.tokenizer),
        pad_token_id=encoder.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    encoder.save(folder)
    return folder


def measure(folder: Path, shape: str, triplets: list[Triplet], rounds: int) -> dict[str, Any]:
    annotator = Annotator.load(folder, dtype="bfloat16")
    pairs = [p for p in annotator.encode(triplets, "prompt_left") if isinstance(p, EncodedPair)]
    print(f"{shape}, {annotator.backend.dtype}", file=sys.stderr)
    annotator.score_pairs(pairs)
    seconds, ceilings = [], []
    for _ in range(rounds):
        ceilings.append(matrix_ceilings(annotator))
        taken, _ = timed(lambda: annotator.score_pairs(pairs))
        seconds.append(taken)
    with torch.profiler.profile(experimental_config=ALL_THREADS) as profile:
        annotator.score_pairs(pairs)
    on_gpu = annotator.backend.device.startswith("cuda")
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    largest = sorted(times, key=times.__getitem__, reverse=True)[:PROFILED]
    result = {
        "shape": shape,
        "dtype": annotator.backend.dtype,
        "pairs": len(pairs),
        "pairs_per_second": len(pairs) / statistics.median(seconds),
        "seconds": seconds,
        **utilisation(annotator, pairs, statistics.median(seconds), ceilings),
        "share_of_time": {name: times[name] / sum(times.values()) for name in largest},
    }
    annotator.backend.close()
    return result


def show(results: list[dict[str, Any]]) -> None:
    table = Table("shape", "pairs/s", "of the matrix ceiling", "time goes to", box=None)
    for result in results:
        shares = result["share_of_ceiling"].items()
        times = result["share_of_time"].items()
        table.add_row(
            result["shape"],
            f"{result['pairs_per_second']:.2f}",
            "\n".join(f"{share['matrix']:.0%} of {name}'s" for name, share in shares),
            "\n".join(f"{share:.0%} {name}" for name, share in times),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
