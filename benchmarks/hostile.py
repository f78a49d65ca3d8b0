"""What requests that are made to cost most do to the service: to its event loop, and its memory.

    python benchmarks/hostile.py

While each of them is answered, a probe is asked again and again: the longest that it waits is the
longest that the event loop was held. Memory is the resident size of the service above what it was
before, over the size of the body after inflation.

Writes benchmarks/results/hostile.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
import measurement
import psutil
from servers import ours

BODY_BYTES = (16 << 20) - 1024
BAR_SECONDS = 0.3
BAR_MEMORY = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a request did."""

    request: str
    sent_bytes: int
    body_bytes: int
    status: int
    seconds: float
    loop_held_seconds: float
    memory_over_body: float


def repeated(head: bytes, item: bytes, tail: bytes) -> bytes:
    """As many items as a body may hold."""
    return head + item * ((BODY_BYTES - len(head) - len(tail)) // len(item)) + tail


def bodies() -> dict[str, tuple[str, bytes]]:
    """Path and body of each request, by what it is."""
    triplet = json.dumps({"prompt": "ab", "response_a": "cd", "response_b": "ef"}).encode()
    turn = b'{"role":"user","content":"ab"},'
    braces = json.dumps({"prompt": "{,[" * 1000, "response_a": '"', "response_b": "\n"}).encode()
    return {
        "empty triplets": ("/annotate", repeated(b'{"triplets":[', b"{},", b"{}]}")),
        "small triplets": ("/annotate", repeated(b'{"triplets":[', triplet + b",", b"{}]}")),
        "turns of one dialogue": (
            "/annotate",
            repeated(b'{"triplets":[{"prompt":[', turn, b"{}]}]}"),
        ),
        "brackets": ("/annotate", repeated(b'{"triplets":', b"[", b"")),
        "numbers beside half a surrogate": (
            "/annotate",
            repeated(b'{"x":"\\ud83d","y":[', b"1,", b"1]}"),
        ),
        "texts full of braces": ("/annotate", repeated(b'{"triplets":[', braces + b",", b"{}]}")),
        "escapes": (
            "/annotate",
            repeated(
                b'{"triplets":[{"response_a":"a","response_b":"b","prompt":"', b"\\n", b'"}]}'
            ),
        ),
        "quotes alone": ("/annotate", repeated(b"", b'"', b"")),
        "empty rewards": ("/get_reward", repeated(b'{"query":[', b'"",', b'""]}')),
        "empty items": ("/score", repeated(b'{"items":[', b"{},", b"{}]}")),
        "spaces": ("/annotate", repeated(b"{", b" ", b"}")),
        "a bomb of spaces": ("/annotate", b" " * (256 << 20)),
    }


def ask(port: int, process: psutil.Process, path: str, sent: bytes) -> tuple[int, float, float]:
    """Status and seconds of the answer, and the longest wait of a probe meanwhile."""
    base = f"http://127.0.0.1:{port}"
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answered = threading.Event()
    longest = 0.0

    def probe() -> None:
        nonlocal longest
        with httpx2.Client(base_url=base, timeout=60) as client:
            while not answered.is_set():
                seconds, _ = measurement.timed(lambda: client.get("/health/live"))
                longest = max(longest, seconds)

    prober = threading.Thread(target=probe)
    prober.start()
    time.sleep(0.3)
    with httpx2.Client(base_url=base, timeout=60) as client:
        longest = 0.0
        seconds, answer = measurement.timed(
            lambda: client.post(path, content=sent, headers=headers)
        )
    answered.set()
    prober.join()
    return answer.status_code, seconds, longest


def outcome(name: str, path: str, body: bytes) -> Outcome:
    """Of a service of its own, whose memory nothing else has stretched."""
    sent = gzip.compress(body, 1)
    with ours() as (port, process):
        ask(port, process, path, gzip.compress(b"{}"))
        before = process.memory_info().rss
        peak = Peak(process)
        with peak:
            status, seconds, held = ask(port, process, path, sent)
    memory = (peak.bytes - before) / min(len(body), BODY_BYTES)
    return Outcome(name, len(sent), len(body), status, seconds, held, memory)


class Peak:
    """The largest resident size of a process within a `with` block, looked at all the time."""

    def __init__(self, process: psutil.Process) -> None:
        self.bytes = 0
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss)


def main() -> None:
    """Send all of them, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=measurement.RESULTS, help="folder to write to"
    )
    folder = parser.parse_args().results
    print(f"bars: the loop is held < {BAR_SECONDS} s, memory < {BAR_MEMORY:g} x the body")
    print(f"{'':32} {'sent':>9} {'body':>11}  status    all   held  memory")
    outcomes = []
    for name, (path, body) in bodies().items():
        found = outcome(name, path, body)
        outcomes.append(found)
        print(
            f"{name:32} {found.sent_bytes:9,} {found.body_bytes:11,} {found.status:7}"
            f" {found.seconds:5.2f}s {found.loop_held_seconds:5.2f}s"
            f" {found.memory_over_body:6.2f}x",
            flush=True,
        )
    record = {
        "command": "python benchmarks/hostile.py",
        "machine": measurement.machine(("fastapi", "uvicorn", "pydantic", "msgspec")),
        "requests": [asdict(found) for found in outcomes],
    }
    measurement.write(folder / "hostile.json", record)


if __name__ == "__main__":
    main()
