"""The rows of an input that a run goes without: bad ones, which are rejected, and ties."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cwpo.datasets.triplets import RejectedRow, by_reason, id_of
from cwpo.datasets.weighted import JsonlWriter
from cwpo.errors import CwpoError, DatasetError
from cwpo.types import ItemError
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import REJECTED_NAME, RunFolder

# The object of a row, or the reason why it has none.
Row = dict[str, Any] | str
# With its 1-based number.
NumberedRow = tuple[int, Row]

# If no row so far is good, the mistake is one of the whole file, such as a missing column.
_ENOUGH = 1000

T = TypeVar("T")


class BadRowError(CwpoError):
    """One row cannot be used; the others are unharmed."""

    def __init__(self, error: ItemError) -> None:
        super().__init__(error.detail)
        self.error = error

    @classmethod
    def invalid(cls, detail: str) -> BadRowError:
        """The row is not what it should be."""
        return cls(ItemError(code="invalid_row", detail=detail))


class UnusedRows:
    """Counts the rows of one input, and keeps those that are rejected.

    A tie is not a bad row: no response is preferred, so its weight is 0.

    Args:
        max_share: share of bad rows, 0 to 1, above which the input is refused.
    """

    def __init__(self, max_share: float = 0) -> None:
        self.rows = 0
        self.ties = 0
        self._max_share = max_share
        # As they are listed.
        self._rejected: list[dict[str, Any]] = []

    def used(
        self, rows: Iterable[NumberedRow], source: object, parse: Callable[[int, Row], T | None]
    ) -> Iterator[T]:
        """The other rows, in order, as `parse` makes them of number and row.

        Args:
            source: where the rows are from, for error messages.
            parse: gives None for a tie. Raises: BadRowError.
        Raises: DatasetError at the end, naming the first bad row, if their share is above
            max_share, or there are no other rows.
        """
        has_good = False
        for number, row in rows:
            self.rows += 1
            try:
                parsed = parse(number, row)
            except BadRowError as bad:
                self._rejected.append(_listed(number, row, bad.error))
                if len(self._rejected) == self.rows == _ENOUGH and self._max_share < 1:
                    break
            else:
                if parsed is None:
                    self.ties += 1
                else:
                    has_good = True
                    yield parsed
        self.check(source, has_good=has_good)

    @property
    def rejected(self) -> Counter[str]:
        """How many rows are rejected for each reason."""
        return Counter(row["code"] for row in self._rejected)

    def tell(self, *, are_listed: bool) -> None:
        """Tell the user how many rows are left out, and why; nothing if none is.

        Args:
            are_listed: whether `write` writes the rejected rows to the output.
        """
        if not process.is_main():
            return
        if self._rejected:
            where = f"; see {REJECTED_NAME} in --output" if are_listed else ""
            count = f"{len(self._rejected):,} of {self.rows:,} rows rejected"
            print(f"{count}: {by_reason(self.rejected)}{where}", file=sys.stderr)
        if self.ties:
            print(
                f"{self.ties:,} of {self.rows:,} rows left out: ties, in which no response is "
                "preferred",
                file=sys.stderr,
            )

    def write(self, folder: Path, part: str = "") -> None:
        """List the rejected rows in a file of the folder; no file if there are none.

        Args:
            part: a word for the input, to begin the name of the file with; empty for the main one.
        """
        if self._rejected and process.is_main():
            with (folder / _named(part, REJECTED_NAME)).open("wb") as sink:
                JsonlWriter(sink).write(self._rejected)

    def report(self, output: RunFolder, part: str = "") -> None:
        """Tell the user, list the rejected rows in the output, and count all in its results.

        Args:
            part: as for `write`; the names of results begin with it too.
        """
        self.tell(are_listed=True)
        self.write(output.path, part)
        output.results |= {
            _named(part, "rejected"): {**self.rejected},
            _named(part, "ties"): self.ties,
        }

    def keep(self, path: Path) -> None:
        """Keep the counts and the rejected rows in a file."""
        kept = {"rows": self.rows, "ties": self.ties, "rejected": self._rejected}
        path.write_text(json.dumps(kept))

    @classmethod
    def kept(cls, path: Path, max_share: float) -> UnusedRows:
        """What `keep` has kept."""
        values = json.loads(path.read_text())
        unused = cls(max_share)
        unused.rows, unused.ties = values["rows"], values["ties"]
        unused._rejected = values["rejected"]
        return unused

    def check(self, source: object, *, has_good: bool) -> None:
        """Raises: DatasetError as `used` does.

        Args:
            has_good: whether there are rows that can be used.
        """
        bad = len(self._rejected)
        if bad <= self._max_share * self.rows and (has_good or not bad):
            return
        first = self._rejected[0]
        extent = (
            f"{bad:,} of {self.rows:,} rows are rejected, a larger share than "
            f"--max-rejected-share {self._max_share:g} allows"
            if has_good
            else f"none of the first {self.rows:,} rows can be used"
        )
        raise DatasetError(f"{source}: row {first['row']}: {first['detail']}; {extent}")


def _named(part: str, name: str) -> str:
    return f"{part}_{name}" if part else name


def _listed(number: int, row: Row, error: ItemError) -> dict[str, Any]:
    if isinstance(row, str):
        return RejectedRow(number, None, error).as_dict()
    return RejectedRow(number, id_of(number, row), error).as_dict() | {"content": _as_json(row)}


def _as_json(row: dict[str, Any]) -> Any:
    """The row without NaN and infinities, and with text for what JSON does not know."""
    return json.loads(json.dumps(row, default=str), parse_constant=lambda _: None)
