"""The service against two FastAPI endpoints, under load, and over many requests.

    CWPO_DATA_DIR=FOLDER python benchmarks/service.py
    python benchmarks/service.py --only throughput --only load

Servers run in processes of their own, the client in this one; rounds of what is compared
alternate, so that what else the machine does falls on both.

throughput: against a bare endpoint, which validates the body and answers one hash of it, and a
plain one of the same work: a typed body, and a typed answer with a label, confidence and scores by
hash for every triplet. With httpx2, the client that the SDK uses, and with bare sockets, which
leave the processor to the server: then the ratio is that of the servers alone.
latency: of a single triplet, and what the service adds to it.
load: latency, refusals and goodput against offered load, on a device of known speed.
offline: pairs/s of a real annotator through the service and in Annotator.annotate.
memory: resident, over many requests.

Writes benchmarks/results/service.json, service-load.svg and service-memory.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import measurement
import numpy as np
from load import closed_loop, library_loop, open_loop, request_bytes, sequence, shared_out
from measurement import timed
from servers import HERE, bare, ours, plain, server
from service_figures import draw_load, draw_memory

from cwpo.types import AnnotateRequest

TRIPLETS = 256
CONNECTIONS = 4
ROUND_SECONDS = 1.5
PACE = 4_000
OFFERED = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
OFFLINE_REQUEST = 32
# About half a second of work may wait for the paced device, two tokens a pair.
PACED_QUEUE = PACE
BAR_RATIO = 0.40
BAR_ADDED_MS = 3.0
BAR_OFFLINE = 0.90


def triplets(count: int, characters: int) -> bytes:
    """A request of triplets whose three texts have so many characters together."""
    rng = random.Random(0)
    words = ["the", "answer", "is", "never", "quite", "what", "a", "question", "hoped", "for"]

    def text(length: int) -> str:
        return " ".join(rng.choice(words) for _ in range(length // 5 + 1))[:length]

    rows = [
        {
            "prompt": text(characters // 3),
            "response_a": text(characters // 3),
            "response_b": text(characters // 3),
        }
        for _ in range(count)
    ]
    return request_bytes(json.dumps({"triplets": rows}).encode())


def throughput(client: str, characters: int, rounds: int) -> dict[str, Any]:
    """Triplets a second of all three, and ours over each of the others: medians over rounds."""
    request = triplets(TRIPLETS, characters)

    def rate(port: int, seconds: float = ROUND_SECONDS) -> float:
        if client == "httpx2":
            work = library_loop(port, request, connections=CONNECTIONS, seconds=seconds)
        else:
            work = closed_loop(port, request, connections=CONNECTIONS, seconds=seconds)
        count, took = asyncio.run(work)
        return count * TRIPLETS / took

    with bare() as (bare_port, _), plain() as (plain_port, _), ours() as (our_port, _):
        ports = {"our": our_port, "bare": bare_port, "plain": plain_port}
        for port in ports.values():
            rate(port, 1.0)
        rates = [{name: rate(port) for name, port in ports.items()} for _ in range(rounds)]
    result: dict[str, Any] = {"client": client, "body_bytes": len(request)}
    for name in ports:
        result[f"{name}_triplets_per_second"] = round(median(at[name] for at in rates))
    print(
        f"{client:>7}, {len(request):>7,} bytes a request: ours "
        f"{result['our_triplets_per_second']:>7,} triplets/s"
    )
    for name in ("bare", "plain"):
        ratios = [at["our"] / at[name] for at in rates]
        result[f"ratio_to_{name}"] = round(median(ratios), 3)
        result[f"ratio_to_{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        print(
            f"{name:>12} {result[f'{name}_triplets_per_second']:>7,} triplets/s, ratio "
            f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    return result


def latency(rounds: int) -> dict[str, Any]:
    """Milliseconds of a single triplet, one request at a time."""
    request = triplets(1, 600)
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    with bare() as (bare_port, _), ours() as (our_port, _):
        for port in (bare_port, our_port):
            asyncio.run(sequence(port, request, requests=300))
        for _ in range(rounds):
            seconds["bare"] += asyncio.run(sequence(bare_port, request, requests=200))
            seconds["ours"] += asyncio.run(sequence(our_port, request, requests=200))
    result = {
        f"{name}_{quantile}_ms": round(float(np.percentile(values, float(quantile[1:]))) * 1e3, 3)
        for name, values in seconds.items()
        for quantile in ("p50", "p99")
    }
    result["added_p50_ms"] = round(result["ours_p50_ms"] - result["bare_p50_ms"], 3)
    print(
        f"single triplet: bare p50 {result['bare_p50_ms']:.2f} ms, ours "
        f"{result['ours_p50_ms']:.2f} ms, added {result['added_p50_ms']:.2f} ms "
        f"(bar < {BAR_ADDED_MS:.0f}); p99 {result['bare_p99_ms']:.2f} and "
        f"{result['ours_p99_ms']:.2f} ms"
    )
    return result


def load(seconds: float, results: Path) -> list[dict[str, Any]]:
    """Latency and refusals against offered load, on a device of known speed."""
    request = triplets(16, 600)
    points = []
    print(f"a device of {PACE:,} pairs/s, requests of 16 with Poisson arrivals:")
    print(f"{'offered':>8} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9} {'refused':>8} {'goodput':>9}")
    for offered in OFFERED:
        rng = np.random.default_rng(0)
        rate = offered * PACE / 16
        arrivals = np.cumsum(rng.exponential(1 / rate, int(rate * seconds))).tolist()
        with server(str(HERE / "paced_service.py"), "PORT", str(PACE), str(PACED_QUEUE)) as (
            port,
            _,
        ):
            took, answers = timed(lambda at=arrivals: asyncio.run(open_loop(port, request, at)))
        served = [answer.seconds * 1e3 for answer in answers if answer.status == 200]
        refused = sum(answer.status == 429 for answer in answers)
        if len(served) + refused != len(answers):
            raise RuntimeError(f"answers: {sorted({answer.status for answer in answers})}")
        p50, p95, p99 = (float(value) for value in np.percentile(served, (50, 95, 99)))
        point = {
            "offered": offered,
            "p50_ms": round(p50, 2),
            "p95_ms": round(p95, 2),
            "p99_ms": round(p99, 2),
            "refused": round(refused / len(answers), 4),
            "pairs_per_second": round(len(served) * 16 / took),
            "goodput": round(len(served) * 16 / took / PACE, 3),
        }
        points.append(point)
        print(
            f"{offered:>8.2f} {p50:>9.2f} {p95:>9.2f} {p99:>9.2f} {point['refused']:>8.1%} "
            f"{point['goodput']:>9.2f}"
        )
    draw_load(points, results / "service-load.svg")
    return points


def offline(pairs: int, rounds: int) -> dict[str, Any]:
    """Pairs a second of MiniLM in float32, through the service and without it."""
    from cwpo_annotator import Annotator

    # Those that fit into MiniLM.
    triplets = measurement.triplets("hh_harmless", pairs, lambda t: len(t.model_dump_json()) < 1500)
    requests = [
        request_bytes(
            AnnotateRequest(triplets=triplets[at : at + OFFLINE_REQUEST])
            .model_dump_json(exclude_none=True)
            .encode()
        )
        for at in range(0, pairs, OFFLINE_REQUEST)
    ]
    rates: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = measurement.with_scalar_head("minilm", Path(folder))
        annotator = Annotator.load(checkpoint, dtype="float32", device="cpu")
        annotator.annotate(triplets[:OFFLINE_REQUEST])
        serve = ("-m", "cwpo", "serve", "--annotator", str(checkpoint), "--dtype", "float32")
        with server(*serve, "--device", "cpu", "--port", "PORT") as (port, _):
            asyncio.run(shared_out(port, requests[:1], connections=1))
            for _ in range(rounds):
                alone, _ = timed(lambda: annotator.annotate(triplets))
                served = asyncio.run(shared_out(port, requests, connections=CONNECTIONS))
                rates.append((pairs / alone, pairs / served))
    result = {
        "model": "all-MiniLM-L6-v2, float32, hh_harmless",
        "pairs": pairs,
        "offline_pairs_per_second": round(median(alone for alone, _ in rates), 2),
        "service_pairs_per_second": round(median(served for _, served in rates), 2),
        "ratio": round(median(served / alone for alone, served in rates), 3),
    }
    print(
        f"{result['model']}: offline {result['offline_pairs_per_second']} pairs/s, through the "
        f"service {result['service_pairs_per_second']}, ratio {result['ratio']:.2f} "
        f"(bar >= {BAR_OFFLINE})"
    )
    return result


def memory(requests: int, results: Path) -> dict[str, Any]:
    """Resident memory of the service while it answers so many requests."""
    request = triplets(1, 600)
    samples: list[tuple[int, float]] = []
    with ours() as (port, process):
        done = 0
        while done < requests:
            count, _ = asyncio.run(closed_loop(port, request, connections=8, seconds=1.0))
            done += count
            samples.append((done, process.memory_info().rss / 2**20))
    at = {share: next(mib for n, mib in samples if n >= share * done) for share in (0.1, 0.5, 1.0)}
    result = {
        "requests": done,
        "start_mib": round(at[0.1], 1),
        "middle_mib": round(at[0.5], 1),
        "end_mib": round(at[1.0], 1),
        "max_mib": round(max(mib for _, mib in samples), 1),
        "samples": [(count, round(mib, 1)) for count, mib in samples],
    }
    print(
        f"memory over {done:,} requests: {result['start_mib']} MiB after a tenth, "
        f"{result['middle_mib']} MiB after half, {result['end_mib']} MiB at the end "
        f"(at most {result['max_mib']})"
    )
    draw_memory(samples, results / "service-memory.svg")
    return result


def throughputs(rounds: int) -> list[dict[str, Any]]:
    """Of both clients, with short and with long texts."""
    print(f"requests of {TRIPLETS} triplets (bar: ratio to bare >= {BAR_RATIO}):")
    return [
        throughput(client, characters, rounds)
        for client in ("httpx2", "sockets")
        for characters in (60, 1200)
    ]


def main() -> None:
    """Run the parts that are named, all without names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("throughput", "latency", "load", "offline", "memory")
    parser.add_argument("--only", action="append", choices=parts, help="a part; may be repeated")
    parser.add_argument("--requests", type=int, default=200_000, help="of the memory part")
    parser.add_argument("--pairs", type=int, default=192, help="of the offline part")
    parser.add_argument("--rounds", type=int, default=7, help="of what is compared")
    parser.add_argument("--load-seconds", type=float, default=8.0, help="at each offered load")
    parser.add_argument(
        "--results", type=Path, default=measurement.RESULTS, help="folder to write to"
    )
    arguments = parser.parse_args()
    rounds, folder = arguments.rounds, arguments.results
    runs: dict[str, Callable[[], Any]] = {
        "throughput": lambda: throughputs(rounds),
        "latency": lambda: latency(rounds),
        "load": lambda: load(arguments.load_seconds, folder),
        "offline": lambda: offline(arguments.pairs, rounds),
        "memory": lambda: memory(arguments.requests, folder),
    }
    path = folder / "service.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    record["command"] = "python benchmarks/service.py"
    machine = measurement.machine(("fastapi", "uvicorn", "pydantic", "cwpo-service"))
    for part in arguments.only or parts:
        # A part that was measured before, perhaps elsewhere, keeps its own.
        record[part] = {"machine": machine, "results": runs[part]()}
        measurement.write(path, record)


if __name__ == "__main__":
    main()
