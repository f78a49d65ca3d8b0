"""What a command found or wrote, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command.

    summary: in words.
    figures: for programs.
    """

    summary: str
    figures: Mapping[str, Any]
