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

_PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct values of the column `prompt`, in order; other columns are not read.

    Raises: DatasetError naming the first bad row.
    """
    prompts = [_prompt(path, number, row) for number, row in file_rows(path)]
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


def _prompt(path: Path, number: int, row: dict[str, object] | str) -> Prompt:
    value = row.get("prompt") if isinstance(row, dict) else None
    if value is None:
        raise DatasetError(f"{path}: row {number}: prompt is missing")
    try:
        prompt = _PROMPT.validate_python(value)
    except ValidationError as error:
        raise DatasetError(f"{path}: row {number}: prompt: {mistake_in(error)}") from error
    problem = text_problem(prompt)
    if problem is not None:
        raise DatasetError(f"{path}: row {number}: {problem.detail}")
    return prompt
