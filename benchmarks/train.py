"""Training against TRL: the CW-DPO step, and Bradley-Terry annotators; cost by length and size.

SmolLM2-135M on hh_harmless; the same weights, tokens, threads and dtype for both; their steps take
turns in one process, and medians are compared. Peak memory is that of a process for each.

    CWPO_DATA_DIR=FOLDER python benchmarks/train.py [--parts dpo bt length size]

A GPU is used where there is one, with larger batches. Gradient checkpointing, which TRL turns on
unasked, is off for both.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from cwpo import Triplet
from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.in_process import best_device
from cwpo_annotator.encoding import Encoder
from cwpo_annotator.responses import ResponseEncoder
from cwpo_trainer import estimate, losses, runtime
from cwpo_trainer.annotators.scorer import Scorer
from cwpo_trainer.commands import Align
from cwpo_trainer.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import models

RESULTS = Path(__file__).parent / "results"
BACKBONE = Path(__file__).parents[1] / "models"
LEARNING_RATE = 2e-5
CONTESTANTS = ("cwpo", "trl")
PARTS = ("dpo", "bt", "length", "size")

# Does one step on a batch of pairs; its loss.
Step = Callable[[Sequence[EncodedPair]], float]


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
        runtime.prepare(seed=0, threads=settings.threads)
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
    settings.results.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv), "machine": machine(settings), "results": results}
    path = settings.results / "train.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    draw(results, settings.results / "train.svg")
    print(f"written to {path}, its curves to train.svg beside it")


# --- data


def triplets() -> Iterator[Triplet]:
    """The pairs of hh_harmless, a the preferred response."""
    data = os.environ.get("CWPO_DATA_DIR")
    if data is None:
        sys.exit("CWPO_DATA_DIR is not set: name the folder of hh_harmless.jsonl.gz")
    with gzip.open(Path(data) / "hh_harmless.jsonl.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            good, bad = row["response_a"], row["response_b"]
            if row["preferred"] == "b":
                good, bad = bad, good
            yield Triplet(prompt=row["prompt"], response_a=good, response_b=bad)


def lengths(encoder: Encoder) -> Iterator[tuple[int, EncodedPair]]:
    """The pairs, each with the tokens of its longer text."""
    for triplet in triplets():
        (pair,) = encoder.encode_pairs([triplet])
        if isinstance(pair, EncodedPair):
            yield max(len(pair.a), len(pair.b)), pair


def pairs_of(encoder: Encoder, count: int, max_length: int) -> list[EncodedPair]:
    """The first pairs of at most max_length tokens a text."""
    fitting = (pair for length, pair in lengths(encoder) if length <= max_length)
    found = list(islice(fitting, count))
    if len(found) < count:
        sys.exit(f"hh_harmless has only {len(found)} pairs of at most {max_length} tokens")
    return found


def of_length(encoder: Encoder, count: int, length: int) -> list[EncodedPair]:
    """Pairs whose longer text has that many tokens, give or take a fifth."""
    fitting = (pair for found, pair in lengths(encoder) if abs(found / length - 1) < 0.2)
    return list(islice(fitting, count))


def batches(pairs: Sequence[EncodedPair], size: int) -> list[list[EncodedPair]]:
    return [list(pairs[at : at + size]) for at in range(0, len(pairs), size)]


# --- the CW-DPO step


def compare_dpo(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    steps = settings.dpo_steps + 1
    pairs = pairs_of(response_encoder(), steps * settings.batch_size, settings.max_length)
    contestants = {name: dpo_step(name, settings, folder) for name in CONTESTANTS}
    turns = batches(pairs, settings.batch_size)
    dtype = torch.bfloat16 if runtime.use_bfloat16(settings.dtype) else torch.float32
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


def dpo_step(name: str, settings: argparse.Namespace, folder: Path) -> Step:
    """A step of either trainer, with forward, backward and optimiser."""
    options: dict[str, Any] = dict(
        output_dir=str(folder / name),
        per_device_train_batch_size=settings.batch_size,
        beta=0.5,
        max_length=None,
        learning_rate=LEARNING_RATE,
        bf16=runtime.use_bfloat16(settings.dtype),
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    arguments: dict[str, Any] = dict(
        model=causal(),
        ref_model=causal() if settings.full else None,
        train_dataset=dpo_rows(pairs_of(response_encoder(), 2, settings.max_length)),
        processing_class=response_encoder().tokenizer,
        peft_config=None if settings.full else lora(),
    )
    trainer: Any
    if name == "cwpo":
        trainer = ConfidenceDPOTrainer(args=ConfidenceDPOConfig(**options), **arguments)
    else:
        trainer = PretokenisedDPOTrainer(args=DPOConfig(**options), **arguments)
    return trl_step(trainer, dpo_rows)


def dpo_operations(settings: argparse.Namespace, batch: Sequence[EncodedPair]) -> float:
    """Of a step, as `cwpo align --dry-run` counts them."""
    texts = [text for pair in batch for text in (pair.a, pair.b)]
    longest = max(map(len, texts))
    scored = len(texts) * (longest - 1)
    if torch.cuda.is_available():
        scored = sum(len(pair.a) + len(pair.b) - 2 * pair.start for pair in batch)
    return estimate.operations(
        estimate.Shape.read(backbone()),
        Align(model="", data=Path(), output=Path(), lora=not settings.full),
        tokens=len(texts) * longest,
        scored=scored,
        length=longest,
        reference=1,
    )


class PretokenisedDPOTrainer(DPOTrainer):
    """TRL's own, on the tokens that the other contestant reads."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def dpo_rows(pairs: Sequence[EncodedPair]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt_ids": list(pair.a[: pair.start]),
                "chosen_ids": list(pair.a[pair.start :]),
                "rejected_ids": list(pair.b[pair.start :]),
                # Then the loss has to be that of TRL.
                "confidence": 1.0,
            }
            for pair in pairs
        ]
    )


def trl_step(trainer: Any, rows: Callable[[Sequence[EncodedPair]], Dataset]) -> Step:
    """One step of a TRL trainer, outside its own loop so that contestants can take turns."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(batch: Sequence[EncodedPair]) -> float:
        inputs = trainer.data_collator(list(rows(batch)))
        loss = trainer.training_step(model, inputs)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def memory_of(name: str) -> int:
    """Peak bytes of a process that does two steps of this contestant only."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak_memory(settings: argparse.Namespace, folder: Path) -> int:
    if settings.memory_of == "cwpo":
        runtime.prepare(seed=0, threads=settings.threads)
    step = dpo_step(settings.memory_of, settings, folder)
    pairs = pairs_of(response_encoder(), 2 * settings.batch_size, settings.max_length)
    for batch in batches(pairs, settings.batch_size):
        step(batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- Bradley-Terry


def compare_bt(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    steps = settings.bt_steps + 1
    pairs = pairs_of(Encoder.create(backbone()), steps * settings.batch_size, settings.max_length)
    contestants = {"cwpo": bt_step(settings), "trl": reward_step(settings, folder)}
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
    bfloat16 = runtime.use_bfloat16(settings.dtype)
    scorer = Scorer(model.to(best_device()), encoder.pad_token_id, bfloat16=bfloat16)
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


def reward_step(settings: argparse.Namespace, folder: Path) -> Step:
    """What TRL's RewardTrainer does in a step."""
    model, encoder = scalar()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(folder / "reward"),
            per_device_train_batch_size=settings.batch_size,
            learning_rate=LEARNING_RATE,
            max_length=None,
            bf16=runtime.use_bfloat16(settings.dtype),
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=reward_rows(pairs_of(encoder, 2, settings.max_length)),
        processing_class=encoder.tokenizer,
    )
    return trl_step(trainer, reward_rows)


def reward_rows(pairs: Sequence[EncodedPair]) -> Dataset:
    return Dataset.from_list(
        [{"chosen_ids": list(pair.a), "rejected_ids": list(pair.b)} for pair in pairs]
    )


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
            times = [timed(step, pairs)[0] for _ in range(3)]
            seconds[name] = median(times[1:]) / len(pairs)
        tokens = statistics.mean(pair.tokens - pair.shared for pair in pairs)
        results.append(
            {"length": length, "pairs": len(pairs), "tokens": tokens, "seconds_a_pair": seconds}
        )
    return results


def by_size(settings: argparse.Namespace, _: Path) -> list[dict[str, Any]]:
    """Seconds to make pairs of tokens, which is all that grows with the data beside the steps."""
    results = []
    encoder = Encoder.create(backbone(), max_length=settings.max_length)
    for size in settings.sizes:
        read = list(islice(triplets(), size))
        begun = time.perf_counter()
        encoder.encode_pairs(read, "prompt_left")
        seconds = time.perf_counter() - begun
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
            taken, loss = timed(contestants[name], batch)
            curves[name].append(loss)
            if turn:
                seconds[name].append(taken)
    return seconds, curves


def differences(curves: dict[str, list[float]]) -> list[float]:
    """Of the two loss curves, step by step."""
    return [abs(a - b) for a, b in zip(*(curves[name] for name in CONTESTANTS), strict=True)]


def timed(step: Step, batch: Sequence[EncodedPair]) -> tuple[float, float]:
    begun = time.perf_counter()
    loss = step(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, loss


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


# --- models


def backbone() -> Path:
    return models.unpacked("smollm2", BACKBONE)


def response_encoder() -> ResponseEncoder:
    encoder = ResponseEncoder.create(backbone())
    assert isinstance(encoder, ResponseEncoder)
    return encoder


def causal() -> Any:
    return AutoModelForCausalLM.from_pretrained(backbone(), dtype=torch.float32)


def scalar() -> tuple[Any, Encoder]:
    """The backbone with a new head, the same every time."""
    torch.manual_seed(0)
    encoder = Encoder.create(backbone())
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone(), num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = encoder.pad_token_id
    return model, encoder


def lora() -> Any:
    return LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


# --- what comes of it


def machine(settings: argparse.Namespace) -> dict[str, Any]:
    libraries = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": settings.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bfloat16": runtime.use_bfloat16(settings.dtype),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def show_dpo(dpo: dict[str, Any]) -> None:
    times = {name: median(of) for name, of in dpo["step_seconds"].items()}
    memory = {name: of / 2**20 for name, of in dpo["peak_bytes"].items()}
    table = Table("CW-DPO step", "cwpo", "TRL", "cwpo / TRL", "bar", box=None)
    table.add_row("seconds", *figures(times, "{:.3f}"), f"{dpo['time_ratio']:.2f}", "<= 1.05")
    ratio = f"{dpo['memory_ratio']:.2f}"
    table.add_row("peak MiB of a process", *figures(memory, "{:,.0f}"), ratio, "<= 1.05")
    Console().print(table)
    rate = dpo["matrix_products_per_second"] / 1e12
    Console().print(
        f"{dpo['share_of_matrix_products']:.0%} of the {rate:.3g} TFLOP/s of matrix products; "
        f"plans count on {estimate.UTILISATION:.0%}"
    )
    show_curves(dpo)


def show_bt(bt: dict[str, Any]) -> None:
    table = Table("Bradley-Terry", "cwpo", "TRL", "cwpo / TRL", "bar", box=None)
    ratio = f"{bt['rate_ratio']:.2f}"
    table.add_row("pairs/s", *figures(bt["pairs_per_second"], "{:.2f}"), ratio, ">= 1.3")
    late = figures(bt["mean_loss_of_second_half"], "{:.4f}")
    table.add_row("loss, second half", *late, "", "the same")
    Console().print(table)
    show_curves(bt)


def show_curves(result: dict[str, Any]) -> None:
    for name in CONTESTANTS:
        Console().print(f"loss of {name:<4}", *(f"{loss:.3f}" for loss in result["loss"][name]))
    Console().print(f"at most {result['largest_loss_difference']:.4f} apart\n")


def show_length(rows: list[dict[str, Any]]) -> None:
    table = Table("tokens a text", "bt, s a pair", "CW-DPO, s a pair", box=None)
    for row in rows:
        seconds = row["seconds_a_pair"]
        table.add_row(str(row["length"]), f"{seconds['bt']:.3f}", f"{seconds['cw_dpo']:.3f}")
    Console().print(table)


def show_size(rows: list[dict[str, Any]]) -> None:
    table = Table("pairs", "tokenising, s", "pairs/s", box=None)
    for row in rows:
        table.add_row(f"{row['pairs']:,}", f"{row['seconds']:.2f}", f"{row['rate']:,.0f}")
    Console().print(table)


SHOWN: dict[str, Callable[[Any], None]] = {
    "dpo": show_dpo,
    "bt": show_bt,
    "length": show_length,
    "size": show_size,
}


def figures(of: dict[str, float], form: str) -> list[str]:
    return [form.format(of[name]) for name in CONTESTANTS]


def draw(results: dict[str, Any], path: Path) -> None:
    """The loss curves, and the cost by length, of the parts that ran."""
    drawn = [part for part in ("dpo", "bt", "length") if part in results]
    if not drawn:
        return
    figure = Figure(figsize=(4.5 * len(drawn), 3.5), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        if part == "length":
            draw_cost(axes, results[part])
            continue
        for name, loss in results[part]["loss"].items():
            axes.plot(range(1, len(loss) + 1), loss, label=name)
        title = {"dpo": "CW-DPO loss", "bt": "Bradley-Terry loss"}[part]
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend()
    figure.savefig(path)


def draw_cost(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in ("bt", "cw_dpo"):
        seconds = [row["seconds_a_pair"][name] for row in rows]
        axes.plot([row["length"] for row in rows], seconds, marker="o", label=name)
    axes.set(title="cost of a pair", xlabel="tokens a text", ylabel="seconds", ylim=(0, None))
    axes.legend()


if __name__ == "__main__":
    main()
