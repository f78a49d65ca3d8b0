from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import pytest
from pydantic.fields import FieldInfo


@pytest.fixture(scope="session")
def settings() -> Callable[[str], dict[str, FieldInfo]]:
    """The settings of a `cwpo` command by name; the test is skipped where it is not installed."""

    def load(command: str) -> dict[str, FieldInfo]:
        (point,) = entry_points(group="cwpo.commands", name=command)
        try:
            return point.load().model_fields
        except ModuleNotFoundError as error:
            pytest.skip(f"cwpo {command}: {error}")

    return load
