"""Writes the tables of losses, weights, ways to train and exit codes into these docs.

They come from what the trainer offers and refuses, from what the tests train by, and from the
client.

python docs/tables.py
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cwpo.cli import flag_errors
from cwpo.errors import ConfigError
from cwpo.exit_codes import ExitCode
from cwpo_trainer.constants import Constant
from cwpo_trainer.losses import LOSSES
from cwpo_trainer.policy import alignment, preflight
from cwpo_trainer.settings.annotator_training import AnnotatorTraining
from cwpo_trainer.settings.policy_training import Alignment, FineTuning
from cwpo_trainer.weights import WEIGHTS

PAGES = tuple(
    Path(__file__).parent / name
    for name in ("cluster.md", "command.md", "method.md", "training.md")
)
COMBINATIONS = Path(__file__).parents[1] / "tests" / "trainer" / "combinations.py"
OURS = " °"


def main() -> None:
    """Write the tables of all pages anew."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


def with_tables(text: str) -> str:
    """The page with each table between `<!-- NAME -->` and `<!-- end -->` as it has to be."""
    for name, table in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: found[1] + table() + found[2],
            text,
            flags=re.DOTALL,
        )
    return text


def losses() -> str:
    """All losses, with their constants."""
    rows = ["| `--loss` | $\\ell$ | from | constants and their defaults |", "|---|---|---|---|"]
    for name, loss in LOSSES.items():
        constants = ", ".join(flag(each) for each in loss.constants)
        ours = "" if is_the_papers(name) else OURS
        rows.append(f"| `{name}`{ours} | ${loss.formula}$ | {loss.source} | {constants} |")
    return "\n".join(rows) + "\n"


def losses_of_the_paper() -> str:
    """The paper's losses, by equation."""
    rows = ["| `--loss` | in `cwpo_trainer.losses` | $\\ell$ | from |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | `{loss.function.__name__}` | ${loss.formula}$ | {loss.source} |"
        for name, loss in LOSSES.items()
        if is_the_papers(name)
    ]
    return "\n".join(rows) + "\n"


def weights() -> str:
    """All weights."""
    rows = [
        "| `--weight` | weight of a pair | in words | constants and their defaults |",
        "|---|---|---|---|",
    ]
    for name, weight in WEIGHTS.items():
        constants = ", ".join(flag(each) for each in weight.constants)
        ours = "" if weight.is_the_papers else OURS
        rows.append(f"| `{name}`{ours} | ${weight.formula}$ | {weight.meaning} | {constants} |")
    return "\n".join(rows) + "\n"


def combinations() -> str:
    """Each way to train a policy: tested, without a test for want of GPUs, or refused."""
    of_tests = runpy.run_path(str(COMBINATIONS))
    combination, tested, kinds = (of_tests[name] for name in ("Combination", "TESTED", "PROCESSES"))
    rows = [
        f"| objective | weights | reference | {' | '.join(kinds.values())} |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    refusals: list[str] = []
    for objectives, references in of_tests["GROUPS"].items():
        names = ", ".join(f"`{name}`" for name in objectives)
        for way in product(of_tests["WEIGHTS"], references):
            alike = ([combination(name, *way, kind) for name in objectives] for kind in kinds)
            found = [status(each, tested, refusals) for each in alike]
            rows.append(f"| {' | '.join((names, *way, *found))} |")
    return "\n".join((*rows, "", *notes(refusals))) + "\n"


def annotator_combinations() -> str:
    """The same of ways to train an annotator."""
    of_tests = runpy.run_path(str(COMBINATIONS))
    combination, kinds = of_tests["AnnotatorCombination"], of_tests["PROCESSES"]
    rows = [f"| objective | weights | {' | '.join(kinds.values())} |", "|---|---|" + "---|" * 4]
    refusals: list[str] = []
    for way in product(of_tests["OF_ANNOTATORS"], of_tests["ANNOTATOR_WEIGHTS"]):
        each = [combination(*way, kind) for kind in kinds]
        found = [status([one], of_tests["TESTED_ANNOTATORS"], refusals) for one in each]
        rows.append(f"| {' | '.join((f'`{way[0]}`', way[1], *found))} |")
    return "\n".join((*rows, "", *notes(refusals))) + "\n"


def notes(refusals: list[str]) -> list[str]:
    """The messages of a table, by their numbers."""
    return [f"{number}. `{message}`" for number, message in enumerate(refusals, 1)]


def status(alike: list[Any], tested: frozenset[Any], refusals: list[str]) -> str:
    """What is known of combinations that differ in the objective's formula alone.

    Args:
        refusals: the messages of the table so far; one that is new is added.
    Raises: ValueError for objectives that are not alike, a tested combination that is refused, and
        one that is neither tested nor refused, although it needs no GPU.
    """
    messages = {refusal(each) for each in alike}
    is_tested = not tested.isdisjoint(alike)
    if len(messages) > 1 or (is_tested and None not in messages):
        raise ValueError(f"{alike[0]}: {messages}")
    (message,) = messages
    if is_tested:
        return "tested"
    if message is None:
        training = settings_of(alike[0])
        is_policy = not isinstance(training, AnnotatorTraining)
        if not (is_policy and preflight.of_gpus(training.optimizer, training.sharding)):
            raise ValueError(f"{alike[0]}: neither tested nor refused")
        return "GPUs only"
    if message not in refusals:
        refusals.append(message)
    return f"refused ({refusals.index(message) + 1})"


def refusal(combination: Any) -> str | None:
    """What its command says of it before it reads anything, on any machine."""
    try:
        settings = settings_of(combination)
    except ValidationError as error:
        return "; ".join(flag_errors(error))
    try:
        if isinstance(settings, AnnotatorTraining):
            return None
        if isinstance(settings, Alignment):
            alignment.check(settings)
        else:
            preflight.check(settings)
    except ConfigError as error:
        return str(error)
    return None


def settings_of(combination: Any) -> Alignment | FineTuning | AnnotatorTraining:
    """Of a run by it, which need not be of this machine. Raises: ValidationError."""
    kinds = {"sft": FineTuning, "align": Alignment, "train-annotator": AnnotatorTraining}
    kind: Any = kinds[combination.command]
    paths = {"model": "model", "data": "data.jsonl", "output": "out"}
    settings: Alignment | FineTuning | AnnotatorTraining = kind(
        **paths, **combination.settings, dry_run=True
    )
    return settings


def is_the_papers(loss: str) -> bool:
    """Whether it is an equation of the paper."""
    return LOSSES[loss].source.startswith("eq.")


def flag(constant: Constant) -> str:
    """A constant's flag and default; the flag alone for a switch that is on."""
    name = f"`--{constant.flag.replace('_', '-')}`"
    return name if constant.default is True else f"{name} {constant.default:g}"


def exit_codes() -> str:
    """How a command ends."""
    rows = ["| exit code | meaning |", "|---|---|"]
    rows += [f"| {code.value} | {code.meaning} |" for code in ExitCode]
    return "\n".join(rows) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "exit codes": exit_codes,
    "losses": losses,
    "losses of the paper": losses_of_the_paper,
    "weights": weights,
    "combinations": combinations,
    "annotator combinations": annotator_combinations,
}

if __name__ == "__main__":
    main()
