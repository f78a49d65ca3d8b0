"""What a batch job of any size needs: GPUs, workers, Redis, store, and what it costs.

A model of few figures, each measured once; `Measured` names the file of the benchmark that gave
it. It tells how much to rent, not how long a job takes to the minute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cwpo.errors import ConfigError

# Dense bfloat16 products in TFLOP/s, by the makers' data sheets (T4: float16).
PEAK_TFLOPS = {
    "a10": 125,
    "a100": 312,
    "b200": 2250,
    "h100": 989,
    "h200": 989,
    "l4": 121,
    "l40s": 362,
    "t4": 65,
}
_SECONDS_OF_HOUR = 3600
_MILLION = 1_000_000


@dataclass(frozen=True)
class Measured:
    """What one measurement gave.

    h100_tflops: of the annotator's matrix products on an H100, by the model's parameters without
        embeddings (benchmarks/results/h100/utilisation.json).
    worker_seconds, service_seconds: of a core, for a row (benchmarks/results/jobs.json).
    redis_bytes: for a job's shards, however many (benchmarks/results/ledger.json).
    request_rows: of one request of a worker.
    text_bytes: of a token; stored: bytes in the store for one of text: of the input, of its shards,
        of the dataset as JSONL and as Parquet (real preference pairs, SmolLM2's tokenizer).
    """

    h100_tflops: tuple[tuple[float, float], ...] = ((106e6, 192.0), (358e6, 371.0))
    worker_seconds: float = 30e-6
    service_seconds: float = 8e-6
    redis_bytes: float = 2e6
    request_rows: int = 256
    text_bytes: float = 4.1
    stored: tuple[float, ...] = (1.05, 1.05, 1.1, 0.4)


MEASURED = Measured()


@dataclass(frozen=True)
class AnnotationPlan:
    """What it takes to annotate `rows` triplets with `gpus` GPUs.

    per_second: triplets of all GPUs; hours: of the GPUs, all together at work.
    is_scaled: whether the rate was measured on another GPU, and scaled by the peaks of both.
    worker_cores, service_cores: that keep up with the GPUs.
    requests: to the service. store_bytes: input, its shards, and both forms of the dataset.
    cost, cost_per_million: of the GPUs, in the unit of their price; None without one.
    """

    rows: float
    gpus: int
    per_second: float
    hours: float
    is_scaled: bool
    worker_cores: int
    service_cores: int
    requests: int
    redis_bytes: float
    store_bytes: float
    cost: float | None
    cost_per_million: float | None


def plan_annotation(
    *,
    rows: float,
    tokens: float,
    parameters: float,
    gpu: str,
    gpus: int,
    gpu_hour: float | None = None,
) -> AnnotationPlan:
    """The plan of one job.

    Args:
        tokens: of a triplet as it is read: its prompt once, and both responses.
        parameters: of the annotator without embeddings; a token costs two operations for each.
        gpu_hour: price of one GPU for an hour, in any currency.
    Raises: ConfigError for a GPU of which no peak is known.
    """
    if gpu not in PEAK_TFLOPS:
        raise ConfigError(f"no GPU {gpu!r} is known; there are {', '.join(sorted(PEAK_TFLOPS))}")
    reached = _reached(parameters) * PEAK_TFLOPS[gpu] / PEAK_TFLOPS["h100"]
    of_one = reached * 1e12 / (2 * parameters * tokens)
    per_second = gpus * of_one
    hours = rows / per_second / _SECONDS_OF_HOUR
    cost = None if gpu_hour is None else hours * gpus * gpu_hour
    text = rows * tokens * MEASURED.text_bytes
    return AnnotationPlan(
        rows=rows,
        gpus=gpus,
        per_second=per_second,
        hours=hours,
        is_scaled=gpu != "h100",
        worker_cores=math.ceil(per_second * MEASURED.worker_seconds),
        service_cores=math.ceil(per_second * MEASURED.service_seconds),
        requests=math.ceil(rows / MEASURED.request_rows),
        redis_bytes=MEASURED.redis_bytes,
        store_bytes=text * sum(MEASURED.stored),
        cost=cost,
        cost_per_million=None if cost is None else cost / rows * _MILLION,
    )


def _reached(parameters: float) -> float:
    """TFLOP/s at this size: between measured sizes by their logarithms, beyond them as at the ends.

    Larger models keep a GPU busier, so that those above the largest one are underestimated; those
    below the smallest one are bound by other things than products, and lose in proportion.
    """
    (small, low), *_, (large, high) = MEASURED.h100_tflops
    if parameters <= small:
        return low * parameters / small
    share = min(1.0, math.log(parameters / small) / math.log(large / small))
    return low + share * (high - low)
