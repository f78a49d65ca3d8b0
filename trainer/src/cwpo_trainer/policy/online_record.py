"""What is kept of the pairs that a policy makes while it trains: their file, and their drift."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwpo_annotator.confidence import drift
from cwpo_trainer.policy.answers import AS_SAMPLED
from cwpo_trainer.run.folder import read_lines


class OnlineRecord:
    """Writes annotated pairs to a file, and measures the drift of confidence over the latest.

    Args:
        path: JSON lines, a weighted dataset with the column `step`.
        quantiles: of confidence on the annotator's held-out pairs; None if it does not say.
        window: number of pairs to measure drift on.
        limit: drift above which a warning is printed, once until drift has been below it again.

    Attributes:
        pairs: number of rows that are no ties.
        drift: of the latest pairs; None before the first one, and without quantiles.
    """

    def __init__(
        self, path: Path, quantiles: Sequence[float] | None, *, window: int, limit: float
    ) -> None:
        self.pairs = 0
        self.drift: float | None = None
        self._path = path
        self._quantiles = quantiles
        self._limit = limit
        self._latest: deque[float] = deque(maxlen=window)
        self._is_above = False

    def start(self, *, after: int) -> None:
        """Keep the rows up to the step that a resumed run goes on after, and drop the others."""
        rows = [row for row in read_lines(self._path) if row["step"] <= after]
        self._path.write_text("".join(map(_line, rows)))
        self._count(rows)
        if self._quantiles is None:
            print(
                "the annotator's folder holds no confidence quantiles, so drift cannot be measured",
                file=sys.stderr,
            )

    def add(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the annotated pairs of a step, and measure drift anew."""
        with self._path.open("a") as sink:
            sink.writelines(map(_line, rows))
        self._count(rows)
        # Few confidences lie far from any distribution.
        is_full = len(self._latest) == self._latest.maxlen
        was_above, self._is_above = self._is_above, is_full and (self.drift or 0.0) > self._limit
        if self._is_above and not was_above:
            print(
                f"step {step}: confidence in the last {len(self._latest):,} pairs has drifted by "
                f"{self.drift:.3f} from that on held-out pairs: the annotator judges answers "
                "unlike those it was trained on; train it on labels of such answers",
                file=sys.stderr,
            )

    def _count(self, rows: Sequence[dict[str, Any]]) -> None:
        self.pairs += sum(row["preferred"] != "tie" for row in rows)
        self._latest.extend(row.get(AS_SAMPLED, row["confidence"]) for row in rows)
        if self._quantiles is not None and self._latest:
            self.drift = drift(np.array(self._latest), self._quantiles)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
