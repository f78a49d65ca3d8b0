"""Pairs a second of the annotator against what one could use instead, on real pairs.

SmolLM2-135M with a scalar head; the same pairs, weights, threads and dtype for all; the rounds go
through all contestants in turn, and medians are reported.

    CWPO_DATA_DIR=FOLDER python benchmarks/annotator.py

Contestants: cwpo; cwpo as a job of `cwpo up`, from the upload to the download; Hugging Face in
length-sorted batches at the batch size that is best for it; pipeline("text-classification"); vLLM
with prefix caching and infinity-emb, where CWPO_VLLM_PYTHON and CWPO_INFINITY_PYTHON name the
interpreters of their environments; on a CPU also cwpo in int8, beside those in float32. What a
contestant's scores differ by from Hugging Face's is recorded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import measurement
import numpy as np
import torch
from contestants import hugging_face, infinity, job, vllm
from flops import matrix_ceilings, rows_of, utilisation
from measurement import RESULTS, timed
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from cwpo import Annotation, Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.torch.scalar import ScalarHeadBackend
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.prefix import common_prefix

# Texts in a batch: the sizes that Hugging Face is tried at, and what the pipeline gets.
BATCH_SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (32, 64, 128, 256)}
PIPELINE_BATCH = {"cpu": 4, "cuda": 64}
DATASETS = ("hh_harmless", "qa_feedback")
# These have several pairs for each prompt, and responses that are in several pairs.
GROUPED = ("qa_feedback", "arenabench_gpt4")

# Scores of both responses, shape (pairs, 2).
Contestant = Callable[[list[Triplet], list[EncodedPair]], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--pairs", type=int, default=2000 if on_gpu else 12, help="of each dataset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--datasets", nargs="*", default=DATASETS)
    parser.add_argument("--grouped", nargs="*", default=GROUPED, help="all pairs of some prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Else the pipeline switches it off for the whole process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = measurement.with_scalar_head("smollm2", Path(folder) / "annotator")
        for dtype in arguments.dtypes:
            with contestants(checkpoint, dtype) as (annotator, field):
                for name, triplets in samples(arguments):
                    results.append(compare(annotator, field, name, triplets, arguments.rounds))
    show(results)
    path = arguments.results / "annotator.json"
    record = {"command": " ".join(sys.argv), "machine": machine(), "results": results}
    measurement.write(path, record)
    draw(results, path.with_suffix(".svg"))
    print(f"written to {path} and {path.with_suffix('.svg').name}")


def machine() -> dict[str, Any]:
    return measurement.machine(
        ("torch", "transformers"), threads=torch.get_num_threads(), gpu=measurement.gpu()
    )


def samples(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Triplet]]]:
    """What is annotated, by name."""
    for dataset in arguments.datasets:
        yield dataset, read(dataset, arguments.pairs)
    for dataset in arguments.grouped:
        yield f"{dataset}, whole prompts", read_prompts(dataset, arguments.pairs)


def read(dataset: str, count: int) -> list[Triplet]:
    """The first pairs of a dataset that fit into the annotator's length."""
    return measurement.triplets(dataset, count, lambda triplet: len(str(triplet.prompt)) < 3500)


def read_prompts(dataset: str, count: int) -> list[Triplet]:
    """All pairs of the first prompts of a dataset, at least so many, in the order of the file."""
    found = read(dataset, sys.maxsize)
    of_prompt = Counter(str(triplet.prompt) for triplet in found)
    upto = [*accumulate(of_prompt.values())]
    kept = {*islice(of_prompt, bisect_left(upto, count) + 1)}
    return [triplet for triplet in found if str(triplet.prompt) in kept]


@contextmanager
def contestants(checkpoint: Path, dtype: str) -> Iterator[tuple[Annotator, dict[str, Contestant]]]:
    annotator = Annotator.load(checkpoint, dtype=dtype)  # type: ignore[arg-type]
    device = annotator.backend.device.partition(":")[0]
    tokenizer = annotator.encoder.tokenizer  # type: ignore[attr-defined]
    pad = annotator.encoder.pad_token_id  # type: ignore[attr-defined]
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype)
    ).to(device)
    model.eval()
    model.config.pad_token_id = pad
    # With a tokenizer of its own, in which it sets padding and truncation.
    by_pipeline = hugging_face.by_pipeline(model, deepcopy(tokenizer), PIPELINE_BATCH[device])
    field: dict[str, Contestant] = {
        "cwpo": lambda triplets, _: scores_of(annotator.annotate(triplets, "prompt_left")),
        "pipeline": lambda _, pairs: by_pipeline(pairs),
    }
    for size in BATCH_SIZES[device]:
        field[f"hugging face, batches of {size}"] = lambda _, pairs, size=size: (
            hugging_face.length_sorted(model, pairs, size)
        )
    with ExitStack() as stack:
        field["cwpo, as a job"] = by_job(
            stack.enter_context(
                job.started(checkpoint, dtype=dtype, threads=torch.get_num_threads())
            )
        )
        if dtype == "float32" and device == "cpu":
            rounded = ScalarHeadBackend(checkpoint, pad_token_id=pad, dtype="int8")
            field["cwpo, int8"] = lambda _, pairs: rounded.score_pairs(pairs).values
        if python := os.environ.get("CWPO_VLLM_PYTHON"):
            annotate = stack.enter_context(
                vllm.started(Path(python), checkpoint, dtype=dtype, device=device)
            )
            field["vllm"] = lambda triplets, _: scores_of(annotate(triplets))
        if python := os.environ.get("CWPO_INFINITY_PYTHON"):
            score = stack.enter_context(
                infinity.started(Path(python), checkpoint, dtype=dtype, device=device)
            )
            field["infinity-emb"] = lambda _, pairs: np.array(
                score([as_query(pair, tokenizer.decode) for pair in pairs]), np.float32
            )
        yield annotator, field


def by_job(scores: Callable[[list[Triplet]], NDArray[np.float32]]) -> Contestant:
    return lambda triplets, _: scores(triplets)


def scores_of(annotations: list[Annotation]) -> NDArray[np.float32]:
    return np.array([(label.score_a, label.score_b) for label in annotations], np.float32)


def as_query(pair: EncodedPair, text_of: Callable[..., str]) -> tuple[str, list[str]]:
    """What both texts begin with, and what each goes on with."""
    shared = common_prefix(pair.a, pair.b)
    return text_of(pair.a[:shared]), [text_of(ids[shared:]) for ids in (pair.a, pair.b)]


def compare(
    annotator: Annotator,
    field: dict[str, Contestant],
    dataset: str,
    triplets: list[Triplet],
    rounds: int,
) -> dict[str, Any]:
    encoded = zip(triplets, annotator.encode(triplets, "prompt_left"), strict=True)
    fitting = [(triplet, pair) for triplet, pair in encoded if isinstance(pair, EncodedPair)]
    triplets, pairs = [triplet for triplet, _ in fitting], [pair for _, pair in fitting]
    print(f"{dataset}, {annotator.backend.dtype}", file=sys.stderr)
    first = {name: scored(name, run, triplets, pairs)[0] for name, run in field.items()}
    peers = [name for name in field if name.startswith("hugging face")]
    best = min(peers, key=first.__getitem__)
    left = {name: run for name, run in field.items() if name not in peers or name == best}
    seconds: dict[str, list[float]] = {name: [] for name in left}
    scores: dict[str, NDArray[np.float32]] = {}
    ceilings: list[dict[str, float]] = []
    for _ in range(rounds):
        ceilings.append(matrix_ceilings(annotator))
        for name, run in left.items():
            taken, scores[name] = scored(name, run, triplets, pairs)
            seconds[name].append(taken)
    medians = {name: statistics.median(of_name) for name, of_name in seconds.items()}
    tokens = sum(pair.tokens for pair in pairs)
    return {
        "dataset": dataset,
        "dtype": annotator.backend.dtype,
        "pairs": len(pairs),
        "tokens": tokens,
        "tokens_read_by_cwpo": (read := sum(len(row.ids) for row in rows_of(annotator, pairs))),
        "tokens_for_each_read": tokens / read,
        "pairs_per_second": {name: len(pairs) / s for name, s in medians.items()},
        "tokens_per_second": {name: tokens / s for name, s in medians.items()},
        "padding_share": {
            "cwpo": annotator.backend.padding,
            best: hugging_face.padding_share(pairs, int(best.rsplit(" ", 1)[1])),
        },
        "seconds": seconds,
        "largest_difference": {
            name: float(np.abs(of_name - scores[best]).max()) for name, of_name in scores.items()
        },
        "ratio": {name: s / medians["cwpo"] for name, s in medians.items() if name != "cwpo"},
        **utilisation(annotator, pairs, medians["cwpo"], ceilings),
    }


def scored(
    name: str, run: Contestant, triplets: list[Triplet], pairs: list[EncodedPair]
) -> tuple[float, NDArray[np.float32]]:
    """Seconds, and the scores."""
    taken, scores = timed(lambda: run(triplets, pairs))
    print(f"  {name}: {len(pairs)} pairs in {taken:.1f} s", file=sys.stderr)
    return taken, scores


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
        line = f"{result['tokens_for_each_read']:.2f} tokens in the data for each that cwpo reads"
        table.add_row("", "", line, "", "", "")
        for name, shares in result["share_of_ceiling"].items():
            line = f"{shares['linear']:.0%} ({shares['matrix']:.0%} with attention's products)"
            table.add_row("", "", f"{line} of the matrix ceiling of {name}", "", "", "")
    Console().print(table)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of pairs a second, one group of them for each dataset and dtype."""
    figure, axes = measurement.plotting().subplots(
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
    measurement.draw(figure, path)


if __name__ == "__main__":
    main()
