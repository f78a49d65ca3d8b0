"""The columns that rows need, under whatever names an input has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

from cwpo.errors import ConfigError, DatasetError
from cwpo.types import Pairs

T = TypeVar("T")
Form = tuple[str, ...]

TRIPLETS: tuple[Form, ...] = (
    ("prompt", "response_a", "response_b"),
    ("prompt", "chosen", "rejected"),
)
LISTS: tuple[Form, ...] = (("prompt", "responses"),)
SINGLES: tuple[Form, ...] = (("prompt", "response"),)

# A column that none of so many rows has is missing, and not just left out of some of them.
_LOOKED_AT = 100


def forms_of(pairs: Pairs | None) -> tuple[Form, ...]:
    """The columns of a file's rows; lists of responses too if it is said which pairs to make."""
    return TRIPLETS if pairs is None else TRIPLETS + LISTS


def parsed_columns(text: str | None) -> dict[str, str] | None:
    """The input's names by those that are needed, of "prompt=question,response_a=answer_1".

    Raises: ConfigError for what is not of this form.
    """
    if text is None:
        return None
    columns = {}
    for pair in text.split(","):
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise ConfigError(
                f"columns: {pair!r} is no NAME=COLUMN: write prompt=question,response_a=answer_1"
            )
        columns[ours.strip()] = theirs.strip()
    return columns


def named(
    rows: Iterable[tuple[int, T]], forms: Sequence[Form], columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, T]]:
    """The numbered rows; those that are dictionaries, with the names that they need.

    Args:
        forms: the columns that a row needs: those of one of the forms.
        columns: the input's names of some columns, by the names that are needed.
    Raises: ConfigError for a name in `columns` that nothing needs; DatasetError, before the first
        row, if the first rows do not have the columns of any form. It names those that there are.
    """
    columns = columns or {}
    _expect_fields(columns, forms)
    iterator = iter(rows)
    first = list(islice(iterator, _LOOKED_AT))
    there = dict.fromkeys(chain(*(row for _, row in first if isinstance(row, Mapping))))
    if there:
        _expect_columns(list(there), forms, columns)
    if not columns:
        yield from chain(first, iterator)
        return
    for number, row in chain(first, iterator):
        yield number, _renamed(row, columns) if isinstance(row, Mapping) else row


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    theirs = {*columns.values(), *columns}
    others = {name: value for name, value in row.items() if name not in theirs}
    return {ours: row.get(name) for ours, name in columns.items()} | others


def _expect_fields(columns: Mapping[str, str], forms: Sequence[Form]) -> None:
    known = dict.fromkeys(["id", *chain(*forms)])
    for name in columns:
        if name not in known:
            raise ConfigError(
                f"columns: {name!r} is no column that a row needs: write "
                f"NAME=COLUMN with a NAME of {', '.join(known)}"
            )


def _expect_columns(
    there: Sequence[str], forms: Sequence[Form], columns: Mapping[str, str]
) -> None:
    for name in columns.values():
        if name not in there:
            raise DatasetError(f"there is no column {name!r}: {_listed(there)}")
    missing = [
        [name for name in form if name not in columns and name not in there] for form in forms
    ]
    if not all(missing):
        return
    form, lacking = min(zip(forms, missing, strict=True), key=lambda each: len(each[1]))
    if "responses" in there and LISTS[0] not in forms:
        raise DatasetError(
            "the rows have lists of responses, and nothing says which pairs to make of them: name "
            "best_worst, adjacent or all with --pairs, or as pairs of a job"
        )
    others = " or ".join(", ".join(form) for form in forms)
    flag = ",".join(f"{name}=COLUMN" for name in form if name in lacking)
    raise DatasetError(
        f"a row needs the columns {others}, and there is no {', '.join(lacking)}: "
        f"{_listed(there)}. Say which is which: --columns {flag} "
        f"(in Python, columns={{{lacking[0]!r}: ...}})"
    )


def _listed(there: Sequence[str]) -> str:
    names = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
    return f"the columns are {names}"
