"""A checkout of the project with an environment of its own, used through public interfaces alone.

So an earlier commit, whose modules have other names, does the same work as the present one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cwpo import Client
from cwpo.errors import CwpoError
from cwpo.process import free_port

START_SECONDS = 120

# Answers each line on stdin with the seconds that one pass over the triplets took.
_ANNOTATE = """
import json, sys, time
from cwpo import Triplet
from cwpo_annotator import Annotator
folder, dtype, path = sys.argv[1:]
triplets = [Triplet(**json.loads(line)) for line in open(path)]
annotator = Annotator.load(folder, dtype=dtype)
for _ in sys.stdin:
    begun = time.perf_counter()
    annotator.annotate(triplets)
    print(time.perf_counter() - begun, flush=True)
"""


class Annotating:
    """A process of a checkout with an annotator in it."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self) -> float:
        """What one pass over the triplets takes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("again", file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@dataclass(frozen=True)
class Checkout:
    """A folder of the project in which `make setup` has run."""

    folder: Path

    @property
    def commit(self) -> str:
        """What is checked out."""
        command = ["git", "-C", str(self.folder), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def cwpo(self, *words: object) -> list[str]:
        """A command line of its `cwpo`."""
        return [self._python, "-m", "cwpo", *map(str, words)]

    def annotating(self, annotator: Path, dtype: str, triplets: Path) -> Annotating:
        """A process that annotates the triplets of a file whenever it is asked."""
        return Annotating([self._python, "-c", _ANNOTATE, str(annotator), dtype, str(triplets)])

    @contextmanager
    def serving(self, *words: object, log: Path) -> Iterator[Client]:
        """A client of the service that `cwpo WORDS --port …` starts, once it answers."""
        port = free_port()
        command = self.cwpo(*words, "--port", port)
        with (
            log.open("wb") as sink,
            subprocess.Popen(command, stdout=sink, stderr=sink) as process,
            Client(f"http://127.0.0.1:{port}", timeout=START_SECONDS) as client,
        ):
            try:
                _wait(client, process, log)
                yield client
            finally:
                process.terminate()

    def seconds_a_step(self, words: list[object], output: Path, steps: int) -> float:
        """What an optimiser step of `cwpo WORDS` takes, from the first that it logs to the last."""
        # The folder has this name until the run has ended.
        log = output.with_name(f".{output.name}.partial") / "training.jsonl"
        command = self.cwpo(*words, "--output", output, "--max-steps", steps)
        seen: list[float] = []
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while len(seen) < steps and process.poll() is None:
                logged = log.read_text().count("\n") if log.exists() else 0
                seen += [time.perf_counter()] * (logged - len(seen))
                time.sleep(0.01)
        if len(seen) < steps:
            sys.exit(f"{' '.join(command)} logged {len(seen)} of {steps} steps")
        return (seen[-1] - seen[0]) / (steps - 1)

    @property
    def _python(self) -> str:
        return str(self.folder / ".venv" / "bin" / "python")


def _wait(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        try:
            client.model()
        except CwpoError as error:
            if process.poll() is not None:
                sys.exit(f"the service ended: {log.read_text()[-2000:]} ({error})")
            time.sleep(0.1)
        else:
            return


def write_rows(path: Path, rows: Iterator[Mapping[str, object]]) -> Path:
    """The rows as JSON lines."""
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
