"""All steps of CW-PO on real input: annotator, service, batch job, CW-DPO, evaluation, report.

    python examples/demo.py --data examples/data/preferences.jsonl \
        --model models/minilm --policy models/smollm2 --run runs/demo

Each step is a `cwpo` command or SDK call that can be repeated by hand; the commands are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import models
from rich.console import Console
from rich.rule import Rule

from cwpo import Client
from cwpo.annotated_file import follow_job
from cwpo.datasets.triplets import NumberedTriplet, read_triplets
from cwpo.errors import CwpoError
from cwpo.process import free_port
from cwpo.types import Job

CWPO = str(Path(sys.executable).with_name("cwpo"))
OUTPUTS = ("annotator", "splits", "accuracy", "sft", "cw-dpo", "dpo", "evaluation", "state")
STARTUP_SECONDS = 120.0
# That of `cwpo up` by default.
PAGE_PORT = 8000

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """A step failed; it has said why itself."""


def main() -> None:
    arguments = parse()
    # A SIGTERM ends the demo as Ctrl-C does: through the `finally` that stops the service.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    started = time.monotonic()
    try:
        demo(arguments)
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except (CwpoError, OSError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted; everything it started is stopped")
    minutes = (time.monotonic() - started) / 60
    console.print(
        f"\nDone in {minutes:.1f} minutes. The report: [bold]{arguments.run}/report.html[/]"
    )
    keep(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data",
        default="examples/data/preferences.jsonl",
        help="labelled pairs: a file or a Hub id such as Anthropic/hh-rlhf",
    )
    parser.add_argument("--model", default="models/minilm", help="base model of the annotator")
    parser.add_argument("--policy", default="models/smollm2", help="the model to align")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder for results")
    parser.add_argument(
        "--max-pairs", type=int, default=2000, help="maximum number of pairs, drawn at random"
    )
    parser.add_argument(
        "--annotator-epochs", type=float, default=3, help="epochs over the labelled pairs"
    )
    parser.add_argument("--steps", type=int, default=6, help="steps of SFT and of each alignment")
    parser.add_argument(
        "--prompts", type=int, default=8, help="number of prompts to sample answers for"
    )
    parser.add_argument(
        "--keep", action="store_true", help="serve the annotator at the end, until Ctrl-C"
    )
    return parser.parse_args()


def demo(arguments: argparse.Namespace) -> None:
    run: Path = arguments.run
    clear(run)
    for path in (arguments.model, arguments.policy):
        if Path(path).parent == Path("models") and Path(path).name in models.UNPACK:
            models.unpacked(Path(path).name, Path("models"))

    step(1, "Train a weak annotator on 30 % of the labels")
    train_annotator(arguments, run)
    step(2, "Start Valkey, the service with that annotator, and an RQ worker")
    with service(run) as client:
        step(3, "Annotate one triplet")
        annotate_one(client, run / "splits" / "unlabelled.jsonl")
        step(4, "Annotate the unlabelled 70 % as a batch job")
        annotate_rest(client, run)
    step(5, "Align the strong model: SFT, then DPO with and without the confidence")
    align(arguments, run)
    step(6, "Evaluate and report")
    evaluate(arguments, run)


def train_annotator(arguments: argparse.Namespace, run: Path) -> None:
    cwpo(
        "train-annotator", "--model", arguments.model, "--data", arguments.data,
        "--output", run / "annotator", "--splits", run / "splits",
        "--labelled-fraction", 0.3, "--held-out-fraction", 0.15,
        # So few labels that none are spared for validation.
        "--validation-fraction", 0,
        "--max-pairs", arguments.max_pairs, "--epochs", arguments.annotator_epochs,
        "--batch-size", 8, "--learning-rate", "1e-4",
    )  # fmt: skip


@contextmanager
def service(run: Path) -> Iterator[Client]:
    """`cwpo up` while the block runs; its output goes to service.log."""
    port = free_port()
    command = service_command(run, port)
    show(command)
    log = run / "service.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C reaches the demo alone, which then stops it in order.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until_ready(process, url, log)
            console.print(f"ready at {url}")
            with Client(url) as client:
                yield client
        finally:
            process.terminate()
            process.wait()
    console.print("service, worker and Valkey stopped")


def service_command(run: Path, port: int) -> list[str]:
    command = [CWPO, "up", "--annotator", run / "annotator", "--port", port]
    command += ["--data-dir", run / "state"]
    return [str(word) for word in command]


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"`cwpo up` ended: {log.read_text().strip().splitlines()[-1]}")
        try:
            if httpx2.get(f"{url}/health/ready").is_success:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise DemoError(f"the service was not ready within {STARTUP_SECONDS:.0f} s; see {log}")


def annotate_one(client: Client, triplets: Path) -> None:
    with triplets.open("rb") as stream:
        rows = read_triplets(stream, "jsonl")
        triplet = next(row.triplet for row in rows if isinstance(row, NumberedTriplet))
    body = {"triplets": [triplet.model_dump(exclude_none=True)]}
    console.print("POST /annotate", style="bold")
    console.print_json(json.dumps(body))
    answer = httpx2.post(f"{client.url}/annotate", json=body)
    console.print(f"{answer.status_code} {answer.reason_phrase}", style="bold")
    console.print_json(answer.text)


def annotate_rest(client: Client, run: Path) -> Job:
    console.print(
        "client.jobs.create(client.files.upload(...).id), then client.jobs.download(...)",
        style="bold",
    )
    file = client.files.upload(run / "splits" / "unlabelled.jsonl")
    job = follow_job(client, client.jobs.create(file.id, truncation="prompt_left").id)
    if job.state not in ("completed", "completed_with_errors"):
        raise DemoError(f"job {job.id} {job.state}: {job.error}")
    for format in ("parquet", "jsonl"):
        path = client.jobs.download(job.id, run / f"weighted.{format}", format=format)
        console.print(f"{path}: {job.progress.rows_annotated:,} rows")
    if job.progress.rows_failed:
        path = client.jobs.download_errors(job.id, run / "weighted.errors.jsonl")
        console.print(f"{path}: {job.progress.rows_failed:,} rows rejected, with reasons")
    return job


def align(arguments: argparse.Namespace, run: Path) -> None:
    shared = [
        "--data", run / "weighted.parquet", "--lora", "--max-steps", arguments.steps,
        "--batch-size", 4, "--gradient-accumulation", 1, "--max-length", 512,
    ]  # fmt: skip
    cwpo("sft", "--model", arguments.policy, "--output", run / "sft", *shared,
         "--learning-rate", "2e-4")  # fmt: skip
    # So young an annotator is unsure throughout; divided by the mean confidence, the two losses are
    # of one size, and the clipping of gradients treats both alike.
    weights = {"cw-dpo": ["confidence", "--normalise"], "dpo": ["none"]}
    for name, weight in weights.items():
        cwpo("align", "--model", run / "sft", "--output", run / name, *shared,
             "--learning-rate", "1e-4", "--weight", *weight)  # fmt: skip


def evaluate(arguments: argparse.Namespace, run: Path) -> None:
    cwpo(
        "evaluate", "policy", run / "cw-dpo", run / "dpo", "--reference", run / "sft",
        # There is no other reward model here. The report says what that means.
        "--judge", run / "annotator", "--allow-annotator-as-judge",
        "--data", run / "splits" / "held_out.jsonl", "--output", run / "evaluation",
        "--prompts", arguments.prompts, "--max-new-tokens", 32, "--batch-size", 16,
    )  # fmt: skip
    cwpo("report", run)


def keep(arguments: argparse.Namespace) -> None:
    """Tell where the page of the service is, which --keep leaves up until Ctrl-C."""
    if not arguments.keep:
        command = shlex.join(service_command(arguments.run, PAGE_PORT)[1:])
        console.print(f"The service's page, http://127.0.0.1:{PAGE_PORT}: cwpo {command}")
        return
    try:
        with service(arguments.run) as client:
            console.print(f"The service's page: [bold]{client.url}[/]. Ctrl-C ends it.")
            with suppress(KeyboardInterrupt):
                signal.pause()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        return


def clear(run: Path) -> None:
    """Remove what an earlier demo left in the folder, and nothing else."""
    for name in OUTPUTS:
        shutil.rmtree(run / name, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)


def cwpo(*arguments: object) -> None:
    """Run a command of ours, shown as one would type it."""
    command = [CWPO, *(str(argument) for argument in arguments)]
    show(command)
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoError(f"`cwpo {arguments[0]}` failed")


def show(command: Sequence[object]) -> None:
    words = ["cwpo", *(str(word) for word in command[1:])]
    console.print(f"$ {shlex.join(words)}", style="dim")


def step(number: int, title: str) -> None:
    console.print()
    console.print(Rule(f"{number}  {title}", align="left"))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
