"""Size and timings of a request, for its log line and trace; never its texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["tokenise", "queue", "inference"]


@dataclass(slots=True)
class Timings:
    """Size of a request, and the start and end of each stage of its processing.

    Args:
        items: number of triplets or texts.
        tokens: number of tokens of all texts, each counted by itself, without those of items that
            could not be tokenised.
        stages: start and end of each stage, in seconds of time.perf_counter.
    """

    items: int = 0
    tokens: int = 0
    stages: dict[Stage, tuple[float, float]] = field(default_factory=dict)
