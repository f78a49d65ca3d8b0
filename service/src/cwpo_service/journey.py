"""What a request went through, for its line in the log and its trace: figures, never texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["tokenise", "queue", "inference"]


@dataclass(slots=True)
class Journey:
    """One request on its way through the service.

    Args:
        items: triplets or texts.
        tokens: of those that could be tokenised.
        stages: begin and end of each, in seconds of time.perf_counter.
    """

    items: int = 0
    tokens: int = 0
    stages: dict[Stage, tuple[float, float]] = field(default_factory=dict)
