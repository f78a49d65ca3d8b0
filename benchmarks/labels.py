"""What people's labels are worth: of triplets that the annotator suggests, and of random ones.

Of the labelled pairs of a data set, 30 % are held out, START are what people have labelled so far,
and the rest is the pool. In each round an annotator picks ADD of the pool (`cwpo evaluate annotator
--suggest`), people's known labels are filled into its sheet, `cwpo review import` adds them, and
the next annotator is trained on all. It is compared with annotators of as many labels that are
drawn at random: accuracy on the held-out pairs, and the share of them that gets a certified label.
Each seed splits the pairs anew; what is in the results already is not run again.

Example:
    python benchmarks/labels.py --data hh_harmless qa_feedback --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import measurement

RESULTS = measurement.RESULTS / "labels.json"
HELD_OUT = 0.3
# Of the labels that a certificate is asked for at this scale; see the contest in docs/evidence.md.
MAX_ERROR = 0.3
START, RANDOM, SUGGESTED = "start", "random", "suggested"
COLOURS = {RANDOM: "#8a9299", SUGGESTED: "#1f6f8b"}
MEASURES = {"accuracy": "agrees with people, %", "certified": "certified, % of the pairs"}
CWPO = str(Path(sys.executable).with_name("cwpo"))

Rows = list[dict[str, Any]]


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
    """Print the table, and write the results and their drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["hh_harmless", "qa_feedback"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--start", type=int, default=150, help="labels of the first annotator")
    parser.add_argument("--add", type=int, default=150, help="labels that people add in a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.output.read_text()) if options.output.is_file() else {}
    names = ("start", "add", "rounds", "epochs", "max_length")
    settings = {name: getattr(options, name) for name in names}
    if known and known["settings"] != settings:
        sys.exit(f"{options.output} was measured with {known['settings']}: name another --output")
    trained = [Trained(**row) for row in known.get("trained", [])]
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": measurement.machine(("cwpo-trainer", "torch", "transformers")),
        "settings": settings,
    }
    for seed in options.seeds:
        for data in options.data:
            if any((each.data, each.seed) == (data, seed) for each in trained):
                continue
            with tempfile.TemporaryDirectory() as folder:
                trained += measured(data, seed, options, Path(folder))
            rows = [asdict(each) for each in trained]
            measurement.write(options.output, {**record, "trained": rows})
    show(trained)
    draw(trained, options.output.with_suffix(".svg"))


def measured(data: str, seed: int, options: argparse.Namespace, folder: Path) -> Iterator[Trained]:
    """The annotators of one split."""
    rows = [*measurement.preferences(data)]
    write(folder / "all.jsonl", rows)
    share = round(options.start / (len(rows) * (1 - HELD_OUT)), 6)
    cwpo(
        *("data", "split", folder / "all.jsonl", "--held-out-fraction", HELD_OUT),
        *("--labelled-fraction", share, "--seed", seed, "--output", folder / "parts"),
    )
    start, pool, held_out = (
        folder / "parts" / f"{name}.jsonl" for name in ("labelled", "unlabelled", "held_out")
    )
    left = read(pool)
    places = [folder / START, *(folder / f"{SUGGESTED}-{at}" for at in range(options.rounds))]
    suggest = ("--compare-with", pool, "--suggest", options.add)
    train(start, places[0], held_out, seed, options, *suggest)
    yield Trained(data, seed, START, *figures(start, places[0]))
    counts, labels = [], start
    for before, place in pairwise(places):
        sheet = before / "assessment" / "to_label.csv"
        answer(sheet, left)
        more = folder / f"{place.name}.jsonl"
        cwpo("review", "import", sheet, "--labelled", labels, "-o", more)
        # Ties of the pool, which people cannot decide, are left out.
        counts.append(len(read(more)) - len(read(labels)))
        labels, known = more, {row["id"] for row in read(more)}
        left = [row for row in left if row["id"] not in known]
        write(pool, left)
        train(labels, place, held_out, seed, options, *(suggest if place != places[-1] else ()))
        yield Trained(data, seed, SUGGESTED, *figures(labels, place))
    yield from drawn_at_random(data, seed, options, folder, counts)


def drawn_at_random(
    data: str, seed: int, options: argparse.Namespace, folder: Path, counts: Sequence[int]
) -> Iterator[Trained]:
    """The annotators of as many labels, each with those of the one before it and more."""
    start, held_out = (folder / "parts" / f"{name}.jsonl" for name in ("labelled", "held_out"))
    labelled = read(start)
    taken = {row["id"] for part in (start, held_out) for row in read(part)}
    pool = [row for row in read(folder / "all.jsonl") if row["id"] not in taken]
    drawn = random.Random(seed).sample(pool, sum(counts))
    for at in range(len(counts)):
        labels, place = folder / f"{RANDOM}-{at}.jsonl", folder / f"{RANDOM}-{at}"
        write(labels, [*labelled, *drawn[: sum(counts[: at + 1])]])
        train(labels, place, held_out, seed, options)
        yield Trained(data, seed, RANDOM, *figures(labels, place))


def train(
    labels: Path,
    place: Path,
    held_out: Path,
    seed: int,
    options: argparse.Namespace,
    *flags: object,
) -> None:
    """An annotator of these labels, measured on the held-out pairs, with flags for that."""
    threads = ("--threads", options.threads)
    cwpo(
        *("train-annotator", "--model", measurement.backbone("minilm"), "--data", labels),
        *("--output", place / "annotator", "--epochs", options.epochs, "--batch-size", 8),
        *("--learning-rate", "1e-4", "--max-length", options.max_length, "--held-out-fraction", 0),
        *("--seed", seed, *threads),
    )
    cwpo(
        *("evaluate", "annotator", place / "annotator", "--data", held_out, *threads),
        *("--max-error", MAX_ERROR, "--output", place / "assessment", *flags),
    )


def figures(labels: Path, place: Path) -> tuple[int, float, float]:
    """Labels, accuracy and certified share of an annotator."""
    results = json.loads((place / "assessment" / "run.json").read_text())["results"]
    certificate = results["certificate"]
    certified = 0.0 if certificate is None else certificate["coverage"]
    return len(read(labels)), results["accuracy"], certified


def answer(sheet: Path, pool: Rows) -> None:
    """Fill in what people are known to prefer."""
    preferred = {row["id"]: row["preferred"] for row in pool}
    with sheet.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"preferred": preferred[row["id"]], "reviewer": "people"})


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cwpo(*words: object) -> None:
    subprocess.run([CWPO, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def steps(trained: Sequence[Trained], choice: str) -> list[list[Trained]]:
    """The annotators of a choice by number of labels, from the first on, each of all seeds."""
    of_seed: dict[int, list[Trained]] = {}
    for each in trained:
        if each.choice in (START, choice):
            of_seed.setdefault(each.seed, []).append(each)
    return [[*step] for step in zip(*of_seed.values(), strict=True)]


def show(trained: Sequence[Trained]) -> None:
    """By data set and labels: means over seeds, and suggested less random with its error."""
    for data in dict.fromkeys(each.data for each in trained):
        of_data = [each for each in trained if each.data == data]
        both = zip(steps(of_data, RANDOM), steps(of_data, SUGGESTED), strict=True)
        for theirs, ours in both:
            print(f"{data:12} {ours[0].labels:5} labels", end="")
            for measure in MEASURES:
                gains = [
                    getattr(a, measure) - getattr(b, measure)
                    for a, b in zip(ours, theirs, strict=True)
                ]
                print(
                    f"  {measure}: random {mean(getattr(each, measure) for each in theirs):.1%}, "
                    f"suggested {mean(gains):+.1%} ± {error(gains):.1%}",
                    end="",
                )
            print()


def error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def draw(trained: Sequence[Trained], path: Path) -> None:
    """Measures over labels: means over seeds with their standard errors, seeds as thin lines."""
    names = [*dict.fromkeys(each.data for each in trained)]
    figure, grid = measurement.plotting().subplots(
        len(MEASURES),
        len(names),
        figsize=(4.2 * len(names), 5.6),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for line, (measure, label) in zip(grid, MEASURES.items(), strict=True):
        for axes, data in zip(line, names, strict=True):
            of_data = [each for each in trained if each.data == data]
            for choice, colour in COLOURS.items():
                found = steps(of_data, choice)
                labels = [mean(each.labels for each in step) for step in found]
                values = [[100 * getattr(each, measure) for each in step] for step in found]
                for of_seed in zip(*values, strict=True):
                    axes.plot(labels, of_seed, color=colour, linewidth=0.5, alpha=0.5)
                axes.errorbar(
                    labels,
                    [mean(step) for step in values],
                    [error(step) for step in values],
                    color=colour,
                    marker="o",
                    label=choice,
                )
            axes.set_ylabel(label)
            if measure == "certified":
                axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
            axes.spines[["top", "right"]].set_visible(False)
    for axes, data in zip(grid[0], names, strict=True):
        axes.set_title(data, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("labels")
    grid[0][0].legend(frameon=False)
    measurement.draw(figure, path)


if __name__ == "__main__":
    main()
