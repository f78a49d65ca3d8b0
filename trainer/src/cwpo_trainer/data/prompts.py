"""The prompts that a policy answers in online rounds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cwpo.errors import DatasetError, mistake_in
from cwpo.texts import text_problem
from cwpo.types import Prompt
from cwpo_trainer.data.labelled import prompt_key
from cwpo_trainer.data.rows import file_rows
from cwpo_trainer.data.unused_rows import BadRowError, Row, UnusedRows

_PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


def read_prompts(path: Path, unused: UnusedRows) -> list[Prompt]:
    """The distinct values of the column `prompt`, in order; other columns are not read.

    Args:
        unused: takes the rows that are left out.
    Raises: DatasetError for a file that cannot be read, or naming the first of too many bad rows.
    """
    prompts: list[Prompt] = list(unused.used(file_rows(path), path, _prompt))
    distinct = {prompt_key(prompt): prompt for prompt in prompts}
    if not distinct:
        raise DatasetError(f"{path}: holds no prompts")
    return [*distinct.values()]


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
