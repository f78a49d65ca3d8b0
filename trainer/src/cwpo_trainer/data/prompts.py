"""The prompts that a policy answers, in online rounds and in evaluations."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cwpo.errors import DatasetError, mistake_in
from cwpo.texts import text_problem
from cwpo.types import Prompt
from cwpo_trainer.data.conversations import one_of_each
from cwpo_trainer.data.labelled import LabelledPair, pairs_of, prompt_key, source_rows
from cwpo_trainer.data.rows import file_rows
from cwpo_trainer.data.unused_rows import BadRowError, NumberedRow, Row, UnusedRows

# Rows that tell what a file holds: a bad one tells nothing.
_FIRST_ROWS = 20
_COLUMNS_OF_PAIRS = frozenset({"chosen", "response_a"})
_PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


def read_prompts(path: Path, unused: UnusedRows) -> list[Prompt]:
    """The distinct values of the column `prompt`, in order; other columns are not read.

    Args:
        unused: takes the rows that are left out.
    Raises: DatasetError for a file that cannot be read, or naming the first of too many bad rows.
    """
    return _prompts_of(file_rows(path), path, unused)


def read_prompts_and_pairs(
    source: str, unused: UnusedRows
) -> tuple[list[Prompt], list[LabelledPair]]:
    """The distinct prompts of a file or Hub dataset, in order, and its labelled pairs.

    The first rows tell whether it has pairs: if one has a column `chosen` or `response_a`. Without,
    each row needs a prompt only.

    Args:
        source: as for `labelled_pairs`; unused: takes the rows that are left out.
    Raises: DatasetError for a source that cannot be read, or naming the first of too many bad rows.
    """
    rows = source_rows(source)
    first = [*islice(rows, _FIRST_ROWS)]
    has_pairs = any(
        isinstance(row, dict) and not _COLUMNS_OF_PAIRS.isdisjoint(row) for _, row in first
    )
    rows = chain(first, rows)
    if not has_pairs:
        return _prompts_of(rows, source, unused), []
    pairs = [*pairs_of(rows, source, unused)]
    return _distinct(pair.prompt for pair in pairs), pairs


def drawn_prompts(prompts: Sequence[Prompt], wanted: int, *, seed: int) -> list[Prompt]:
    """At most so many prompts, in order, drawn at random: one of each conversation.

    Prompts of one conversation are alike, and would not be independent draws.
    """
    places = one_of_each(prompts, seed=seed)
    if len(places) > wanted:
        places = sorted(random.Random(seed).sample(places, wanted))  # noqa: S311
    return [prompts[at] for at in places]


def _prompts_of(rows: Iterable[NumberedRow], source: object, unused: UnusedRows) -> list[Prompt]:
    distinct = _distinct(unused.used(rows, source, _prompt))
    if not distinct:
        raise DatasetError(f"{source}: holds no prompts")
    return distinct


def _distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    return [*{prompt_key(prompt): prompt for prompt in prompts}.values()]


def prompts_of_round(
    prompts: Sequence[Prompt], number: int, wanted: int | None, seed: int
) -> list[Prompt]:
    """The prompts of round `number`, from 1 on: the next `wanted` of a shuffled list.

    After its end the list starts again. If `wanted` is None, each round answers all prompts.
    """
    order = list(prompts)
    random.Random(seed).shuffle(order)  # noqa: S311
    if wanted is None:
        return order
    start = (number - 1) * wanted
    return [order[at % len(order)] for at in range(start, start + min(wanted, len(order)))]


def _prompt(_: int, row: Row) -> Prompt:
    """The prompt in a row. Raises: BadRowError."""
    if isinstance(row, str):
        raise BadRowError.invalid(row)
    value = row.get("prompt")
    if value is None:
        raise BadRowError.invalid("prompt is missing")
    try:
        prompt = _PROMPT.validate_python(value)
    except ValidationError as error:
        raise BadRowError.invalid(f"prompt: {mistake_in(error)}") from error
    problem = text_problem(prompt)
    if problem is not None:
        raise BadRowError(problem)
    return prompt
