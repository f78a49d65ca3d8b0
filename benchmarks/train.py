"""Training against TRL: the CW-DPO step, and Bradley-Terry annotators; cost by length and size.

SmolLM2-135M on hh_harmless; the same weights, tokens, threads and dtype for both; their steps take
turns in one process, and medians are compared. Peak memory is that of a process for each.

    CWPO_DATA_DIR=FOLDER python benchmarks/train.py [--parts dpo bt length size]

A GPU is used where there is one, with larger batches. Gradient checkpointing, which TRL turns on
unasked, is off for both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import measurement
import torch
from contestants import trl
from contestants.trl import Step
from measurement import RESULTS, backbone, timed
from training_figures import CONTESTANTS, SHOWN, draw
from training_material import (
    LEARNING_RATE,
    batches,
    lora,
    of_length,
    pairs_of,
    response_encoder,
    scalar,
    triplets,
)

from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_trainer import losses
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.plan import estimate
from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.run import process

PARTS = ("dpo", "bt", "length", "size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--batch-size", type=int, default=64 if on_gpu else 4, help="pairs a step")
    parser.add_argument("--dpo-steps", type=int, default=40 if on_gpu else 6)
    parser.add_argument("--bt-steps", type=int, default=150 if on_gpu else 14)
    parser.add_argument("--max-length", type=int, default=512, help="longer pairs are left out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--full", action="store_true", help="DPO without LoRA")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        if settings.memory_of is not None:
            print(json.dumps(peak_memory(settings, Path(folder))))
            return
        process.prepare(seed=0, threads=settings.threads)
        measures: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
            "dpo": compare_dpo,
            "bt": compare_bt,
            "length": by_length,
            "size": by_size,
        }
        results = {}
        for part in settings.parts:
            results[part] = measures[part](settings, Path(folder))
            SHOWN[part](results[part])
    record = {"command": " ".join(sys.argv), "machine": machine(settings), "results": results}
    path = settings.results / "train.json"
    measurement.write(path, record)
    draw(results, path.with_suffix(".svg"))
    print(f"written to {path}, its curves to train.svg beside it")


# --- the CW-DPO step


def compare_dpo(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    steps = settings.dpo_steps + 1
    pairs = pairs_of(response_encoder(), steps * settings.batch_size, settings.max_length)
    contestants = {name: dpo_step(name, settings, folder) for name in CONTESTANTS}
    turns = batches(pairs, settings.batch_size)
    dtype = torch.bfloat16 if process.use_bfloat16(settings.dtype) else torch.float32
    before = estimate.measured_rate(dtype)
    seconds, curves = race(contestants, turns)
    rate = (before + estimate.measured_rate(dtype)) / 2
    counted = [dpo_operations(settings, batch) for batch in turns[1:]]
    memory = {name: memory_of(name) for name in CONTESTANTS}
    return {
        "step_seconds": seconds,
        "loss": curves,
        "largest_loss_difference": max(differences(curves)),
        "peak_bytes": memory,
        "time_ratio": median(seconds["cwpo"]) / median(seconds["trl"]),
        "memory_ratio": memory["cwpo"] / memory["trl"],
        "matrix_products_per_second": rate,
        "share_of_matrix_products": median(
            [done / taken / rate for done, taken in zip(counted, seconds["cwpo"], strict=True)]
        ),
    }


def dpo_operations(settings: argparse.Namespace, batch: Sequence[EncodedPair]) -> float:
    """Of a step, as `cwpo align --dry-run` counts them."""
    texts = [text for pair in batch for text in (pair.a, pair.b)]
    longest = max(map(len, texts))
    scored = len(texts) * (longest - 1)
    if torch.cuda.is_available():
        scored = sum(len(pair.a) + len(pair.b) - 2 * pair.start for pair in batch)
    return estimate.operations(
        estimate.Shape.read(backbone("smollm2")),
        estimate.Method(lora_rank=None if settings.full else lora().r),
        tokens=len(texts) * longest,
        scored=scored,
        length=longest,
        reference=1,
    )


def memory_of(name: str) -> int:
    """Peak bytes of a process that does two steps of this contestant only."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak_memory(settings: argparse.Namespace, folder: Path) -> int:
    if settings.memory_of == "cwpo":
        process.prepare(seed=0, threads=settings.threads)
    step = dpo_step(settings.memory_of, settings, folder)
    pairs = pairs_of(response_encoder(), 2 * settings.batch_size, settings.max_length)
    for batch in batches(pairs, settings.batch_size):
        step(batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def dpo_step(name: str, settings: argparse.Namespace, folder: Path) -> Step:
    if name == "trl":
        return trl.dpo_step(settings, folder)
    return trl.dpo_step(settings, folder, ConfidenceDPOTrainer, ConfidenceDPOConfig)


# --- Bradley-Terry


def compare_bt(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    steps = settings.bt_steps + 1
    pairs = pairs_of(
        Encoder.create(backbone("smollm2")), steps * settings.batch_size, settings.max_length
    )
    contestants = {"cwpo": bt_step(settings), "trl": trl.reward_step(settings, folder)}
    seconds, curves = race(contestants, batches(pairs, settings.batch_size))
    rates = {name: settings.batch_size / median(of) for name, of in seconds.items()}
    late = {name: statistics.mean(of[len(of) // 2 :]) for name, of in curves.items()}
    return {
        "step_seconds": seconds,
        "loss": curves,
        "pairs_per_second": rates,
        "rate_ratio": rates["cwpo"] / rates["trl"],
        "mean_loss_of_second_half": late,
        "mean_loss_difference": statistics.mean(differences(curves)),
        "largest_loss_difference": max(differences(curves)),
    }


def bt_step(settings: argparse.Namespace) -> Step:
    """What `cwpo train-annotator` does in a step."""
    model, encoder = scalar()
    bfloat16 = process.use_bfloat16(settings.dtype)
    scorer = ScalarHeadScorer(model.to(best_device()), encoder.pad_token_id, bfloat16=bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    model.train()

    def step(batch: Sequence[EncodedPair]) -> float:
        total = torch.zeros((), device=model.device)
        for scores in scorer.scores(batch):
            loss = losses.bradley_terry(scores[:, 0] - scores[:, 1]).sum() / len(batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


# --- cost


def by_length(settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds a pair of both our steps, on pairs of about one length."""
    steps = {"bt": bt_step(settings), "cw_dpo": dpo_step("cwpo", settings, folder)}
    encoder = response_encoder()
    results = []
    for length in settings.lengths:
        pairs = of_length(encoder, max(settings.batch_size // 2, 1), length)
        seconds = {}
        for name, step in steps.items():
            times = [timed(lambda step=step, pairs=pairs: step(pairs))[0] for _ in range(3)]
            seconds[name] = median(times[1:]) / len(pairs)
        tokens = statistics.mean(pair.tokens - common_prefix(pair.a, pair.b) for pair in pairs)
        results.append(
            {"length": length, "pairs": len(pairs), "tokens": tokens, "seconds_a_pair": seconds}
        )
    return results


def by_size(settings: argparse.Namespace, _: Path) -> list[dict[str, Any]]:
    """Seconds to make pairs of tokens, which is all that grows with the data beside the steps."""
    results = []
    encoder = Encoder.create(backbone("smollm2"), max_length=settings.max_length)
    for size in settings.sizes:
        read = list(islice(triplets(), size))
        seconds, _ = timed(lambda read=read: encoder.encode_pairs(read, "prompt_left"))
        results.append({"pairs": len(read), "seconds": seconds, "rate": len(read) / seconds})
    return results


# --- the race


def race(
    contestants: dict[str, Step], turns: list[list[EncodedPair]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of each contestant's steps, which take turns; the first is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    curves: dict[str, list[float]] = {name: [] for name in contestants}
    for turn, batch in enumerate(turns):
        # Whoever goes second finds the tokens in the cache: they change places.
        order = list(contestants) if turn % 2 else list(contestants)[::-1]
        for name in order:
            taken, loss = timed(lambda step=contestants[name], batch=batch: step(batch))
            curves[name].append(loss)
            if turn:
                seconds[name].append(taken)
    return seconds, curves


def differences(curves: dict[str, list[float]]) -> list[float]:
    """Of the two loss curves, step by step."""
    return [abs(a - b) for a, b in zip(*(curves[name] for name in CONTESTANTS), strict=True)]


def machine(settings: argparse.Namespace) -> dict[str, Any]:
    return measurement.machine(
        ("torch", "transformers", "trl", "peft", "accelerate"),
        threads=settings.threads,
        gpu=measurement.gpu(),
        bfloat16=process.use_bfloat16(settings.dtype),
    )


if __name__ == "__main__":
    main()
