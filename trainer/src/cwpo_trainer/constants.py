"""The numbers and switches that a loss or a weight can be told, each declared in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from cwpo.errors import mistake_in


@dataclass(frozen=True, eq=False)
class Constant:
    """A number or switch that a loss or a weight can be told, other than what it is computed from.

    Args:
        argument: its name in the function.
        flag: its name as a flag of `cwpo align` and as a setting, with underscores.
        kind: its type with its bounds, as pydantic reads them: Annotated[float, Field(gt=0)].
        default: the value of the flag where it is not given.
        meaning: the help of the flag, without the full stop.
        trl_name: its field of ConfidenceDPOConfig, where TRL calls it by another name than the
            flag.
    """

    argument: str
    flag: str
    kind: Any
    default: float
    meaning: str
    trl_name: str | None = None

    @property
    def config_field(self) -> str:
        """Its field of ConfidenceDPOConfig."""
        return self.trl_name or self.flag

    def problem(self, value: float) -> str | None:
        """What is wrong with a value that is out of bounds; None where nothing is."""
        try:
            TypeAdapter(self.kind).validate_python(value)
        except ValidationError as error:
            return f"{mistake_in(error)}, not {value}"
        return None

    def check(self, value: float) -> None:
        """Raises: ValueError for a value out of bounds."""
        problem = self.problem(value)
        if problem is not None:
            raise ValueError(f"{self.argument}: {problem}")


class HasConstants(Protocol):
    """A loss or a weight."""

    @property
    def constants(self) -> tuple[Constant, ...]:
        """What its function can be told."""
        ...


def names_by_constant(registry: Mapping[str, HasConstants]) -> dict[Constant, list[str]]:
    """Each constant in a registry of losses or of weights, with the names of those that have it."""
    names: dict[Constant, list[str]] = {}
    for name, entry in registry.items():
        for constant in entry.constants:
            names.setdefault(constant, []).append(name)
    return names
