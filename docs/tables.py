"""Writes the tables of losses and weights into these docs from what the trainer offers.

python docs/tables.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cwpo_trainer.constants import Constant
from cwpo_trainer.losses import LOSSES
from cwpo_trainer.weights import WEIGHTS

PAGES = tuple(Path(__file__).parent / name for name in ("method.md", "training.md"))
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


def is_the_papers(loss: str) -> bool:
    """Whether it is an equation of the paper."""
    return LOSSES[loss].source.startswith("eq.")


def flag(constant: Constant) -> str:
    """A constant's flag and default; the flag alone for a switch that is on."""
    name = f"`--{constant.flag.replace('_', '-')}`"
    return name if constant.default is True else f"{name} {constant.default:g}"


TABLES: dict[str, Callable[[], str]] = {
    "losses": losses,
    "losses of the paper": losses_of_the_paper,
    "weights": weights,
}

if __name__ == "__main__":
    main()
