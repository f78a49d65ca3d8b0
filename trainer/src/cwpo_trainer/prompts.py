"""The prompts that a policy answers in online rounds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cwpo.datasets import file_format, read_rows
from cwpo.errors import DatasetError
from cwpo.texts import text_problem
from cwpo.types import Prompt
from cwpo_trainer.data import prompt_key

_PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct values of the column `prompt`, in order; other columns are not read.

    Raises: DatasetError naming the first bad row.
    """
    try:
        with path.open("rb") as stream:
            rows = read_rows(stream, file_format(path))
            prompts = [_prompt(path, number, row) for number, row in rows]
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    distinct = {prompt_key(prompt): prompt for prompt in prompts}
    if not distinct:
        raise DatasetError(f"{path}: holds no prompts")
    return [*distinct.values()]


def prompts_of_round(
    prompts: Sequence[Prompt], number: int, wanted: int | None, seed: int
) -> list[Prompt]:
    """What round `number`, from 1 on, answers: the next `wanted` prompts of a shuffled list.

    The list starts anew where it ends. With None each round answers all.
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
        reason = error.errors(include_url=False)[0]["msg"]
        raise DatasetError(f"{path}: row {number}: prompt: {reason}") from error
    problem = text_problem(prompt)
    if problem is not None:
        raise DatasetError(f"{path}: row {number}: {problem.detail}")
    return prompt
