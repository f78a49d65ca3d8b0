"""Pairs a second of the annotator against what one could use instead, on real pairs.

SmolLM2-135M with a scalar head; the same pairs, weights, threads and dtype for all; the rounds go
through all contestants in turn, and medians are reported.

    CWPO_DATA_DIR=FOLDER python benchmarks/annotator.py

Contestants: cwpo; Hugging Face in length-sorted batches at the batch size that is best for it;
pipeline("text-classification"); vLLM with prefix caching and infinity-emb, where CWPO_VLLM_PYTHON
and CWPO_INFINITY_PYTHON name the interpreters of their environments; on a CPU also cwpo in int8,
beside those in float32. What a contestant's scores differ by from Hugging Face's is recorded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import infinity
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, pipeline

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.onednn import OneDnnLinear
from cwpo_annotator.backends.torch import TorchBackend
from cwpo_annotator.backends.vllm_server import VllmServer
from cwpo_annotator.encoding import Encoder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import models

RESULTS = Path(__file__).parent / "results" / "annotator.json"
BATCH_SIZES = (1, 2, 4, 8, 16)
DATASETS = ("hh_harmless", "qa_feedback")

# Scores of both responses, shape (pairs, 2).
Contestant = Callable[[list[Triplet], list[EncodedPair]], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12, help="of each dataset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = with_scalar_head(Path(folder) / "annotator")
        for dtype in arguments.dtypes:
            with contestants(checkpoint, dtype) as (annotator, field):
                for dataset in arguments.datasets:
                    triplets = read(dataset, arguments.pairs)
                    results.append(compare(annotator, field, dataset, triplets, arguments.rounds))
    show(results)
    record = {"command": " ".join(sys.argv), "machine": machine(), "results": results}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    draw(results, RESULTS.with_suffix(".svg"))
    print(f"written to {RESULTS} and {RESULTS.with_suffix('.svg').name}")


def machine() -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def with_scalar_head(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = models.unpacked("smollm2", Path("models"))
    encoder = Encoder.create(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    model.config.pad_token_id = encoder.pad_token_id
    model.save_pretrained(folder)
    encoder.save(folder)
    return folder


def read(dataset: str, count: int) -> list[Triplet]:
    """The first pairs of a dataset that fit into the annotator's length."""
    data = os.environ.get("CWPO_DATA_DIR")
    if data is None:
        sys.exit("CWPO_DATA_DIR is not set: name the folder of hh_harmless.jsonl.gz and the others")
    names = ("id", "prompt", "response_a", "response_b")
    with gzip.open(Path(data) / f"{dataset}.jsonl.gz", "rt") as lines:
        rows = (json.loads(line) for line in lines)
        found = (Triplet(**{name: row[name] for name in names}) for row in rows)
        short = (t for t in found if len(str(t.prompt)) < 3500)
        return [triplet for _, triplet in zip(range(count), short, strict=False)]


@contextmanager
def contestants(checkpoint: Path, dtype: str) -> Iterator[tuple[Annotator, dict[str, Contestant]]]:
    annotator = Annotator.load(checkpoint, dtype=dtype)  # type: ignore[arg-type]
    pad = annotator.encoder.pad_token_id  # type: ignore[attr-defined]
    hugging_face = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype)
    ).to(annotator.backend.device)
    hugging_face.eval()
    text_of = annotator.encoder.tokenizer.decode  # type: ignore[attr-defined]
    hugging_face.config.pad_token_id = pad
    classify = pipeline(
        "text-classification",
        model=hugging_face,
        tokenizer=annotator.encoder.tokenizer,  # type: ignore[attr-defined]
        function_to_apply="none",
        device=annotator.backend.device,
    )
    field: dict[str, Contestant] = {
        "cwpo": lambda triplets, _: annotated(annotator, triplets),
        "pipeline": lambda _, pairs: paired(
            classify([text_of(ids) for pair in pairs for ids in (pair.a, pair.b)], batch_size=4)
        ),
    }
    for size in BATCH_SIZES:
        field[f"hugging face, batches of {size}"] = lambda _, pairs, size=size: length_sorted(
            hugging_face, pad, pairs, size
        )
    with ExitStack() as stack:
        if dtype == "float32" and annotator.backend.device == "cpu":
            rounded = TorchBackend(checkpoint, pad_token_id=pad, dtype="int8")
            field["cwpo, int8"] = lambda _, pairs: rounded.score_pairs(pairs)
        if python := os.environ.get("CWPO_VLLM_PYTHON"):
            # So that the texts of one round can be forgotten before the next.
            os.environ["VLLM_SERVER_DEV_MODE"] = "1"
            server = VllmServer(
                Path(python), checkpoint, dtype=dtype, on_cpu=annotator.backend.device == "cpu"
            )
            server.start()
            stack.callback(server.stop)
            remote = Annotator.over_vllm(checkpoint, server.url, dtype=dtype)  # type: ignore[arg-type]
            field["vllm"] = lambda triplets, _: from_nothing(server, remote, triplets)
        if python := os.environ.get("CWPO_INFINITY_PYTHON"):
            score = stack.enter_context(
                infinity.started(
                    Path(python), checkpoint, dtype=dtype, device=annotator.backend.device
                )
            )
            field["infinity-emb"] = lambda _, pairs: np.array(
                score([as_query(pair, text_of) for pair in pairs]), np.float32
            )
        yield annotator, field


def annotated(annotator: Annotator, triplets: list[Triplet]) -> NDArray[np.float32]:
    labels = annotator.annotate(triplets, "prompt_left")
    return np.array([(label.score_a, label.score_b) for label in labels], np.float32)


def from_nothing(
    server: VllmServer, remote: Annotator, triplets: list[Triplet]
) -> NDArray[np.float32]:
    """As `annotated`, with nothing of an earlier round in vLLM's prefix cache."""
    httpx.post(f"{server.url}/reset_prefix_cache").raise_for_status()
    return annotated(remote, triplets)


def paired(answers: list[dict[str, Any]]) -> NDArray[np.float32]:
    return np.array([answer["score"] for answer in answers], np.float32).reshape(-1, 2)


def as_query(pair: EncodedPair, text_of: Callable[..., str]) -> tuple[str, list[str]]:
    """What both texts begin with, and what each goes on with."""
    return text_of(pair.a[: pair.shared]), [text_of(ids[pair.shared :]) for ids in (pair.a, pair.b)]


@torch.inference_mode()
def length_sorted(model: Any, pad: int, pairs: list[EncodedPair], size: int) -> NDArray[np.float32]:
    texts = [ids for pair in pairs for ids in (pair.a, pair.b)]
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
    scores = np.empty(len(texts), np.float32)
    for start in range(0, len(texts), size):
        places = order[start : start + size]
        batch = [list(texts[at]) for at in places]
        width = len(batch[0])
        ids = torch.tensor([[*text, *[pad] * (width - len(text))] for text in batch])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in batch])
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        scores[places] = logits[:, 0].float().cpu().numpy()
    return scores.reshape(-1, 2)


def compare(
    annotator: Annotator,
    field: dict[str, Contestant],
    dataset: str,
    triplets: list[Triplet],
    rounds: int,
) -> dict[str, Any]:
    pairs = [p for p in annotator.encode(triplets, "prompt_left") if isinstance(p, EncodedPair)]
    print(f"{dataset}, {annotator.backend.dtype}", file=sys.stderr)
    first = {name: timed(name, run, triplets, pairs)[0] for name, run in field.items()}
    peers = [name for name in field if name.startswith("hugging face")]
    best = min(peers, key=first.__getitem__)
    left = {name: run for name, run in field.items() if name not in peers or name == best}
    seconds: dict[str, list[float]] = {name: [] for name in left}
    scores: dict[str, NDArray[np.float32]] = {}
    ceilings: list[dict[str, float]] = []
    for _ in range(rounds):
        ceilings.append(matrix_ceilings(annotator))
        for name, run in left.items():
            taken, scores[name] = timed(name, run, triplets, pairs)
            seconds[name].append(taken)
    medians = {name: statistics.median(of_name) for name, of_name in seconds.items()}
    tokens = sum(pair.tokens for pair in pairs)
    return {
        "dataset": dataset,
        "dtype": annotator.backend.dtype,
        "pairs": len(pairs),
        "tokens": tokens,
        "tokens_read_by_cwpo": tokens - sum(pair.shared for pair in pairs),
        "pairs_per_second": {name: len(pairs) / s for name, s in medians.items()},
        "tokens_per_second": {name: tokens / s for name, s in medians.items()},
        "padding_share": {
            "cwpo": annotator.backend.padding,
            best: padding_share(pairs, int(best.rsplit(" ", 1)[1])),
        },
        "seconds": seconds,
        "largest_difference": {
            name: float(np.abs(of_name - scores[best]).max()) for name, of_name in scores.items()
        },
        "ratio": {name: s / medians["cwpo"] for name, s in medians.items() if name != "cwpo"},
        **utilisation(annotator, pairs, medians["cwpo"], ceilings),
    }


def utilisation(
    annotator: Annotator, pairs: list[EncodedPair], seconds: float, ceilings: list[dict[str, float]]
) -> dict[str, Any]:
    """FLOP/s of the linear layers, and with the products of attention, beside the ceilings'."""
    read_tokens = sum(pair.tokens - pair.shared for pair in pairs)
    linear = 2 * linear_parameters(annotator) * read_tokens
    flops = {"linear": linear, "matrix": linear + attention_flops(annotator, pairs)}
    ceiling = {name: statistics.median(c[name] for c in ceilings) for name in ceilings[0]}
    return {
        "gflops": {kind: count / seconds / 1e9 for kind, count in flops.items()},
        "matrix_ceiling_gflops": {name: rate / 1e9 for name, rate in ceiling.items()},
        "share_of_ceiling": {
            name: {kind: count / seconds / rate for kind, count in flops.items()}
            for name, rate in ceiling.items()
        },
    }


def padding_share(pairs: list[EncodedPair], size: int) -> float:
    lengths = sorted((len(ids) for pair in pairs for ids in (pair.a, pair.b)), reverse=True)
    batches = (lengths[at : at + size] for at in range(0, len(lengths), size))
    return 1 - sum(lengths) / sum(len(batch) * batch[0] for batch in batches)


def timed(
    name: str, run: Contestant, triplets: list[Triplet], pairs: list[EncodedPair]
) -> tuple[float, NDArray[np.float32]]:
    begun = time.perf_counter()
    scores = run(triplets, pairs)
    taken = time.perf_counter() - begun
    print(f"  {name}: {len(pairs)} pairs in {taken:.1f} s", file=sys.stderr)
    return taken, scores


@torch.inference_mode()
def matrix_ceilings(annotator: Annotator) -> dict[str, float]:
    """FLOP/s of plain matrix products of the model's shapes: torch's own, and oneDNN's on a CPU."""
    model = annotator.backend.model  # type: ignore[attr-defined]
    narrow, wide = model.config.hidden_size, model.config.intermediate_size
    tokens = annotator.backend.token_budget  # type: ignore[attr-defined]
    inputs = torch.randn(tokens, narrow, dtype=model.dtype, device=model.device)
    linear = torch.nn.Linear(narrow, wide, bias=False, dtype=model.dtype, device=model.device)
    layers: dict[str, torch.nn.Module] = {"torch": linear}
    if model.device.type == "cpu":
        layers["onednn"] = OneDnnLinear(linear, tokens)
    return {
        name: 2 * tokens * narrow * wide / seconds_each(layer, inputs)
        for name, layer in layers.items()
    }


def seconds_each(layer: torch.nn.Module, inputs: torch.Tensor) -> float:
    times = []
    for _ in range(25):
        begun = time.perf_counter()
        for _ in range(5):
            layer(inputs)
        if inputs.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / 5)
    return statistics.median(times[5:])


def linear_parameters(annotator: Annotator) -> int:
    model = annotator.backend.model  # type: ignore[attr-defined]
    kinds = (torch.nn.Linear, OneDnnLinear)
    layers = (m for m in model.modules() if isinstance(m, kinds))
    return sum(layer.in_features * layer.out_features for layer in layers)


def attention_flops(annotator: Annotator, pairs: list[EncodedPair]) -> int:
    """Of the two products of attention, for the keys that each token sees and no others."""
    config = annotator.backend.model.config  # type: ignore[attr-defined]
    seen = 0
    for pair in pairs:
        first, second = sorted((len(pair.a), len(pair.b)))
        shared = min(pair.shared, first - 1)
        seen += sum(length * (length + 1) // 2 for length in (first, second))
        seen -= shared * (shared + 1) // 2
    width = config.num_attention_heads * config.head_dim
    return 4 * width * config.num_hidden_layers * seen


def show(results: list[dict[str, Any]]) -> None:
    table = Table("dataset", "dtype", "contestant", "pairs/s", "cwpo is", "scores differ", box=None)
    for result in results:
        for name, rate in result["pairs_per_second"].items():
            ratio = result["ratio"].get(name)
            table.add_row(
                result["dataset"],
                result["dtype"],
                name,
                f"{rate:.2f}",
                "" if ratio is None else f"{ratio:.2f}x",
                f"{result['largest_difference'][name]:.1e}",
            )
        for name, shares in result["share_of_ceiling"].items():
            line = f"{shares['linear']:.0%} ({shares['matrix']:.0%} with attention's products)"
            table.add_row("", "", f"{line} of the matrix ceiling of {name}", "", "", "")
    Console().print(table)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of pairs a second, one group of them for each dataset and dtype."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cwpo"})
    figure, axes = plt.subplots(
        len(results), figsize=(6.4, 1.7 * len(results)), sharex=True, layout="constrained"
    )
    for of_result, result in zip(np.atleast_1d(axes), results, strict=True):
        rates = sorted(result["pairs_per_second"].items(), key=lambda item: item[1])
        names, values = zip(*rates, strict=True)
        colours = ["#1f6f8b" if name.startswith("cwpo") else "#c3c9cf" for name in names]
        of_result.bar_label(of_result.barh(names, values, color=colours), fmt="%.1f", padding=3)
        of_result.set_title(f"{result['dataset']}, {result['dtype']}", loc="left", fontsize="small")
        of_result.spines[["top", "right"]].set_visible(False)
        of_result.tick_params(labelsize="small")
    of_result.set_xlabel("pairs a second")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
