"""Training against TRL: the CW-DPO step, and Bradley-Terry annotators; cost by length and size.

SmolLM2-135M on hh_harmless, whose pairs are single, and on qa_feedback, where several pairs have
one long prompt; the same weights, tokens, threads and dtype for both contestants.

    CWPO_DATA_DIR=FOLDER python benchmarks/train.py [--parts memory dpo bt length size]

Their steps take turns on the same batches in one process. A ratio is the median over the steps of
what ours takes of theirs in a step. Beside it is the ratio of the tokens that they read, padding
included: at one speed a token, that of the times would be the same.

Peak memory is that of a process for each, of many steps, so that memory that grows is seen; it is
measured first, while this process has no model in memory. On a CPU it is VmHWM of Linux; ru_maxrss
begins at that of the process that started this one.

In bfloat16, losses of single steps differ by rounding, and their mean difference is printed: a loss
is that of small differences of log-probabilities, which are sums over a response. In float32 they
have to be equal, and the first three are checked to agree within 1e-3; later, AdamW makes steps of
full size out of gradients that are rounding only. To check that alone:

    python benchmarks/train.py --parts dpo bt --dtype float32 --dpo-steps 2 --bt-steps 2

A GPU is used where there is one, with larger batches. Gradient checkpointing, which TRL turns on
unasked, is off for both.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import measurement
import torch
from contestants import trl
from contestants.trl import Contestant
from measurement import RESULTS, backbone, timed
from training_figures import CONTESTANTS, SHOWN, draw
from training_material import (
    LEARNING_RATE,
    LONGEST,
    batches,
    by_prompt,
    lora,
    of_length,
    response_encoder,
    scalar,
    shuffled,
    triplets,
)

from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.backends.torch.rows.packing import pack_pairs
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_trainer import losses
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.plan import estimate
from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.run import process

PARTS = ("memory", "dpo", "bt", "length", "size")

# Tokens of the longest text on which memory is measured.
MEMORY_LENGTH = 512

# Steps whose losses are compared in float32, and by how much they may differ.
COMPARED, TOLERANCE = 3, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument(
        "--data", choices=LONGEST, nargs="+", default=[*LONGEST], help="of memory, dpo and bt"
    )
    parser.add_argument("--batch-size", type=int, default=64 if on_gpu else 4, help="pairs a step")
    parser.add_argument("--dpo-steps", type=int, default=40 if on_gpu else 6)
    parser.add_argument("--bt-steps", type=int, default=150 if on_gpu else 14)
    parser.add_argument(
        "--memory-steps", type=int, default=10, help="CW-DPO steps of a process; record with 100"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens of the longest text in dpo and bt; by default "
        + ", ".join(f"{tokens} of {name}" for name, tokens in LONGEST.items()),
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--full", action="store_true", help="DPO without LoRA")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-data", choices=LONGEST, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    process.prepare(seed=0, threads=settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        if settings.memory_of is not None:
            print(json.dumps(peak_memory(settings, Path(folder))))
            return
        results = measured(settings, Path(folder))
    record = {"command": " ".join(sys.argv), "machine": machine(settings), "results": results}
    path = settings.results / "train.json"
    measurement.write(path, record)
    draw(results, path.with_suffix(".svg"))
    print(f"written to {path}, its curves to train.svg beside it")
    if not process.use_bfloat16(settings.dtype):
        check_losses(results)


def measured(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The results of all parts, in the order of PARTS; each is shown when it is there."""
    of_data: dict[str, Callable[[argparse.Namespace, Path, str], Any]] = {
        "memory": compare_memory,
        "dpo": compare_dpo,
        "bt": compare_bt,
    }
    of_cost = {"length": by_length, "size": by_size}
    results: dict[str, Any] = {}
    for part in PARTS:
        if part not in settings.parts:
            continue
        if part in of_cost:
            results[part] = of_cost[part](settings, folder)
            SHOWN[part](results[part])
            continue
        results[part] = {}
        for data in settings.data:
            results[part][data] = of_data[part](settings, folder, data)
            SHOWN[part](data, results[part][data])
    return results


# --- memory


def compare_memory(settings: argparse.Namespace, _: Path, data: str) -> dict[str, Any]:
    memory = {name: memory_of(name, data) for name in CONTESTANTS}
    return {
        "steps": settings.memory_steps,
        "peak_bytes": memory,
        "memory_ratio": memory["cwpo"] / memory["trl"],
    }


def memory_of(name: str, data: str) -> int:
    """Peak bytes of a process that does steps of this contestant only."""
    command = [sys.executable, *sys.argv, "--memory-of", name, "--memory-data", data]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak_memory(settings: argparse.Namespace, folder: Path) -> int:
    contestant = dpo(settings.memory_of, settings, folder)
    for batch in batches(
        response_encoder(),
        shuffled(settings.memory_data),
        count=settings.memory_steps,
        size=settings.batch_size,
        longest=MEMORY_LENGTH,
    ):
        contestant.step(batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return most_resident()


def most_resident() -> int:
    """Peak bytes of this process in memory."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found is not None:
            return 1024 * int(found[1])
    of_this = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes.
    return of_this if sys.platform == "darwin" else 1024 * of_this


# --- the CW-DPO step


def compare_dpo(settings: argparse.Namespace, folder: Path, data: str) -> dict[str, Any]:
    turns = batches(
        response_encoder(),
        shuffled(data),
        count=settings.dpo_steps + 1,
        size=settings.batch_size,
        longest=settings.max_length or LONGEST[data],
    )
    contestants = {name: dpo(name, settings, folder) for name in CONTESTANTS}
    dtype = torch.bfloat16 if process.use_bfloat16(settings.dtype) else torch.float32
    before = estimate.measured_rate(dtype)
    results = race(contestants, turns)
    rate = (before + estimate.measured_rate(dtype)) / 2
    counted = [
        dpo_operations(settings, batch, tokens)
        for batch, tokens in zip(turns[1:], results["tokens"]["cwpo"], strict=True)
    ]
    return {
        **results,
        "matrix_products_per_second": rate,
        "share_of_matrix_products": median(
            done / taken / rate
            for done, taken in zip(counted, results["step_seconds"]["cwpo"], strict=True)
        ),
    }


def dpo_operations(
    settings: argparse.Namespace, batch: Sequence[EncodedPair], tokens: int
) -> float:
    """Of a step that reads so many tokens, as `cwpo align --dry-run` counts operations."""
    texts = [text for pair in batch for text in (pair.a, pair.b)]
    return estimate.operations(
        estimate.Shape.read(backbone("smollm2")),
        estimate.Method(lora_rank=None if settings.full else lora().r),
        tokens=tokens,
        scored=sum(pair.tokens - 2 * pair.start for pair in batch),
        length=statistics.mean(map(len, texts)),
        reference=1,
    )


def dpo(name: str, settings: argparse.Namespace, folder: Path) -> Contestant:
    if name == "trl":
        return trl.dpo(settings, folder)
    return trl.dpo(settings, folder, ConfidenceDPOTrainer, ConfidenceDPOConfig)


# --- Bradley-Terry


def compare_bt(settings: argparse.Namespace, folder: Path, data: str) -> dict[str, Any]:
    turns = batches(
        Encoder.create(backbone("smollm2")),
        by_prompt(data),
        count=settings.bt_steps + 1,
        size=settings.batch_size,
        longest=settings.max_length or LONGEST[data],
    )
    results = race({"cwpo": bt(settings), "trl": trl.reward(settings, folder)}, turns)
    seconds, curves = results["step_seconds"], results["loss"]
    return {
        **results,
        "rate_ratio": 1 / results["time_ratio"],
        "pairs_per_second": {
            name: settings.batch_size / median(of) for name, of in seconds.items()
        },
        "mean_loss_of_second_half": {
            name: statistics.mean(of[len(of) // 2 :]) for name, of in curves.items()
        },
    }


def bt(settings: argparse.Namespace) -> Contestant:
    """What `cwpo train-annotator` does in a step."""
    model, encoder = scalar()
    bfloat16 = process.use_bfloat16(settings.dtype)
    model.to(best_device())
    budget = PassBudget(None, model.device.type)
    scorer = ScalarHeadScorer(model, encoder.pad_token_id, budget, bfloat16=bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    model.train()

    def step(batch: Sequence[EncodedPair]) -> float:
        total = torch.zeros((), device=model.device)
        for read in scorer.passes(batch):
            scores = read()
            loss = losses.bradley_terry(scores[:, 0] - scores[:, 1]).sum() / len(batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    def tokens(batch: Sequence[EncodedPair]) -> int:
        rows = pack_pairs(batch, budget.tokens, most_together=budget.together)
        return sum(len(row.ids) for row in rows)

    return Contestant(step, tokens)


# --- cost


def by_length(settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds a pair of both our steps, on pairs of about one length."""
    contestants = {"bt": bt(settings), "cw_dpo": dpo("cwpo", settings, folder)}
    encoder = response_encoder()
    results = []
    for length in settings.lengths:
        pairs = of_length(encoder, max(settings.batch_size // 2, 1), length)
        seconds = {}
        for name, contestant in contestants.items():
            times = [
                timed(lambda step=contestant.step, pairs=pairs: step(pairs))[0] for _ in range(3)
            ]
            seconds[name] = median(times[1:]) / len(pairs)
        tokens = statistics.mean(pair.tokens - common_prefix(pair.a, pair.b) for pair in pairs)
        results.append(
            {"length": length, "pairs": len(pairs), "tokens": tokens, "seconds_a_pair": seconds}
        )
    return results


def by_size(settings: argparse.Namespace, _: Path) -> list[dict[str, Any]]:
    """Seconds to make pairs of tokens, which is all that grows with the data beside the steps."""
    results = []
    longest = settings.max_length or LONGEST["hh_harmless"]
    encoder = Encoder.create(backbone("smollm2"), max_length=longest)
    for size in settings.sizes:
        read = triplets("hh_harmless")[:size]
        seconds, _ = timed(lambda read=read: encoder.encode_pairs(read, "prompt_left"))
        results.append({"pairs": len(read), "seconds": seconds, "rate": len(read) / seconds})
    return results


# --- the race


def race(
    contestants: dict[str, Contestant], turns: Sequence[Sequence[EncodedPair]]
) -> dict[str, Any]:
    """Seconds, tokens and losses of the contestants' steps, which take turns, and their ratios.

    The first step is a warm-up, of which only the loss counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    tokens: dict[str, list[int]] = {name: [] for name in contestants}
    curves: dict[str, list[float]] = {name: [] for name in contestants}
    for turn, batch in enumerate(turns):
        # Whoever goes second finds the tokens in the cache: they change places.
        order = list(contestants) if turn % 2 else list(contestants)[::-1]
        for name in order:
            step = contestants[name].step
            taken, loss = timed(lambda step=step, batch=batch: step(batch))
            curves[name].append(loss)
            if turn:
                seconds[name].append(taken)
                tokens[name].append(contestants[name].tokens(batch))
    apart = differences(curves)
    return {
        "step_seconds": seconds,
        "tokens": tokens,
        "loss": curves,
        "time_ratio": ratio(seconds),
        "token_ratio": ratio(tokens),
        "mean_loss_difference": statistics.mean(apart),
        "largest_loss_difference": max(apart),
    }


def ratio(of: dict[str, Any]) -> float:
    """Of what ours takes to what TRL takes in a step, the median over the steps."""
    return median(ours / theirs for ours, theirs in zip(of["cwpo"], of["trl"], strict=True))


def differences(curves: dict[str, list[float]]) -> list[float]:
    """Of the two loss curves, step by step."""
    return [abs(a - b) for a, b in zip(*(curves[name] for name in CONTESTANTS), strict=True)]


def check_losses(results: dict[str, Any]) -> None:
    """Exits with a message where the first losses in float32 are not the same."""
    for part in ("dpo", "bt"):
        for data, result in results.get(part, {}).items():
            largest = max(differences(result["loss"])[:COMPARED])
            if largest > TOLERANCE:
                sys.exit(f"{part} on {data}: losses differ by {largest:.2g} in float32")
            print(f"{part} on {data}: first losses within {largest:.2g} in float32")


def machine(settings: argparse.Namespace) -> dict[str, Any]:
    return measurement.machine(
        ("torch", "transformers", "trl", "peft", "accelerate"),
        threads=settings.threads,
        gpu=measurement.gpu(),
        bfloat16=process.use_bfloat16(settings.dtype),
    )


if __name__ == "__main__":
    main()
