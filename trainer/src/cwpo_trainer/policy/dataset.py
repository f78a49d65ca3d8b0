"""The datasets that TRL's trainers read: token ids, without what is too long."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset, concatenate_datasets

from cwpo.errors import DatasetError
from cwpo_trainer.data.left_out import left_out
from cwpo_trainer.run import process
from cwpo_trainer.run.chunks import chunks

# Rows made at once, so that few token ids stand in memory as Python numbers.
_PART = 1024

T = TypeVar("T")


class Fitting(NamedTuple):
    """A dataset, and how many items had no place in it."""

    dataset: Dataset
    too_long: int

    @property
    def results(self) -> dict[str, Any]:
        """The figures for run.json."""
        return {"pairs": len(self.dataset), "pairs_too_long": self.too_long}


def fitting(
    items: Sequence[T],
    rows: Callable[[Sequence[T]], list[dict[str, Any]]],
    max_length: int,
) -> Fitting:
    """The rows that `rows` makes of the items; it leaves out what is longer than max_length tokens.

    What is left out is said on stderr. Raises: DatasetError when nothing is left.
    """
    made = map(rows, chunks(items, _PART, work="tokenise", unit="pairs"))
    parts = [Dataset.from_list(part) for part in made if part]
    if not parts:
        raise DatasetError(f"all {len(items):,} pairs are longer than --max-length {max_length:,}")
    too_long = len(items) - sum(map(len, parts))
    if too_long and process.is_main():
        reasons = Counter(too_long=too_long)
        line = left_out(reasons, len(items), limit=max_length, flag="--max-length")
        print(line, file=sys.stderr)
    return Fitting(concatenate_datasets(parts), too_long)


def named(results: dict[str, Any], part: str) -> dict[str, Any]:
    """The figures under names that start with the part's, such as eval_pairs."""
    return {f"{part}_{name}": value for name, value in results.items()}
