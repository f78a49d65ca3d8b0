"""What people's labels are worth: of triplets that the annotator suggests, and of random ones.

Of the labelled pairs of a data set, 30 % are held out, START are what people have labelled so far,
and the rest is the pool. An annotator of START picks ADD of the pool (`cwpo evaluate annotator
--suggest`), people's known labels are filled into its sheet, `cwpo review import` adds them, and a
second annotator is trained on all. It is compared with one of ADD labels that are drawn at random:
accuracy on the held-out pairs, and the share of them that gets a certified label. Each seed splits
the pairs anew; what is in the results already is not run again.

Example:
    python benchmarks/labels.py --data hh_harmless qa_feedback --seeds 5
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import measurement

RESULTS = measurement.RESULTS / "labels.json"
HELD_OUT = 0.3
# Of the labels that a certificate is asked for at this scale; see the contest in docs/evidence.md.
MAX_ERROR = 0.3
START, RANDOM, SUGGESTED = "start", "random", "suggested"
CWPO = str(Path(sys.executable).with_name("cwpo"))


@dataclass(frozen=True)
class Trained:
    """An annotator and how good it is.

    labels: that it was trained on; certified: share of the held-out pairs above the threshold of a
    certificate, 0 without one.
    """

    data: str
    seed: int
    choice: str
    labels: int
    accuracy: float
    certified: float


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["hh_harmless", "qa_feedback"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", type=int, default=150, help="labels of the first annotator")
    parser.add_argument("--add", type=int, default=150, help="labels that people add")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.output.read_text()) if options.output.is_file() else {}
    settings = {name: getattr(options, name) for name in ("start", "add", "epochs")}
    if known and known["settings"] != settings:
        sys.exit(f"{options.output} was measured with {known['settings']}: name another --output")
    trained = [Trained(**row) for row in known.get("trained", [])]
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": measurement.machine(("cwpo-trainer", "torch", "transformers")),
        "settings": settings,
    }
    for seed in range(options.seeds):
        for data in options.data:
            if any((each.data, each.seed) == (data, seed) for each in trained):
                continue
            with tempfile.TemporaryDirectory() as folder:
                trained += measured(data, seed, options, Path(folder))
            rows = [asdict(each) for each in trained]
            measurement.write(options.output, {**record, "trained": rows})
    show(trained)


def measured(data: str, seed: int, options: argparse.Namespace, folder: Path) -> Iterator[Trained]:
    """The annotators of one split."""
    rows = [*measurement.preferences(data)]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = round(options.start / (len(rows) * (1 - HELD_OUT)), 6)
    cwpo(
        *("data", "split", folder / "all.jsonl", "--held-out-fraction", HELD_OUT),
        *("--labelled-fraction", share, "--seed", seed, "--output", folder / "parts"),
    )
    start, pool, held_out = (
        folder / "parts" / f"{name}.jsonl" for name in ("labelled", "unlabelled", "held_out")
    )
    suggest = ("--compare-with", pool, "--suggest", options.add)
    yield trained_on(start, data, seed, START, held_out, options, *suggest)
    by_id = {row["id"]: row for row in read(pool)}
    sheet = folder / START / "assessment" / "to_label.csv"
    answer(sheet, by_id)
    cwpo("review", "import", sheet, "--labelled", start, "-o", folder / f"{SUGGESTED}.jsonl")
    # The same number of both: ties of the pool, which people cannot decide, are left out.
    added = len(read(folder / f"{SUGGESTED}.jsonl")) - len(read(start))
    drawn = random.Random(seed).sample([*by_id.values()], added)
    lines = [*read(start), *drawn]
    (folder / f"{RANDOM}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    for choice in (RANDOM, SUGGESTED):
        yield trained_on(folder / f"{choice}.jsonl", data, seed, choice, held_out, options)


def trained_on(
    labels: Path,
    data: str,
    seed: int,
    choice: str,
    held_out: Path,
    options: argparse.Namespace,
    *flags: object,
) -> Trained:
    """An annotator of these labels, measured on the held-out pairs, with flags for that."""
    folder = held_out.parent.parent / choice
    threads = ("--threads", options.threads)
    cwpo(
        *("train-annotator", "--model", measurement.backbone("minilm"), "--data", labels),
        *("--output", folder / "annotator", "--epochs", options.epochs, "--batch-size", 8),
        *("--learning-rate", "1e-4", "--max-length", 512, "--held-out-fraction", 0),
        *("--seed", seed, *threads),
    )
    cwpo(
        *("evaluate", "annotator", folder / "annotator", "--data", held_out, *threads),
        *("--max-error", MAX_ERROR, "--output", folder / "assessment", *flags),
    )
    results = json.loads((folder / "assessment" / "run.json").read_text())["results"]
    certificate = results["certificate"]
    certified = 0.0 if certificate is None else certificate["coverage"]
    return Trained(data, seed, choice, len(read(labels)), results["accuracy"], certified)


def answer(sheet: Path, by_id: dict[str, dict[str, Any]]) -> None:
    """Fill in what people are known to prefer."""
    with sheet.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                row | {"preferred": by_id[row["id"]]["preferred"], "reviewer": "people"}
            )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cwpo(*words: object) -> None:
    subprocess.run([CWPO, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def show(trained: Sequence[Trained]) -> None:
    """A line for each data set: means over seeds, and suggested less random with its spread."""
    for data in dict.fromkeys(each.data for each in trained):
        of_data = [each for each in trained if each.data == data]
        by_choice = {
            choice: [each for each in of_data if each.choice == choice]
            for choice in (START, RANDOM, SUGGESTED)
        }
        for choice, found in by_choice.items():
            accuracy = mean(each.accuracy for each in found)
            certified = mean(each.certified for each in found)
            print(
                f"{data:14} {choice:10} {found[0].labels:5} labels  "
                f"accuracy {accuracy:.1%}  certified {certified:.1%}"
            )
        gains = [
            ours.accuracy - theirs.accuracy
            for ours, theirs in zip(by_choice[SUGGESTED], by_choice[RANDOM], strict=True)
        ]
        print(f"{data:14} suggested less random, by seed: {', '.join(f'{g:+.1%}' for g in gains)}")


if __name__ == "__main__":
    main()
