"""How the confidences of a dataset are distributed, and its most and least confident rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field

from cwpo.reviews.pairs import response_text
from cwpo.types import Preference, Prompt

BINS = 20
# Their texts may lie in as many parts.
EXTREMES = 5


class Place(BaseModel):
    """A row of a dataset: its part, its number in it, and its confidence."""

    part: int
    row: int
    confidence: float


class Confidences(BaseModel):
    """What is kept of the confidences of several parts, however many rows they have.

    counts: number of rows in each of BINS equal intervals of [0, 1].
    highest, lowest: up to EXTREMES rows, the most extreme one first.
    """

    counts: list[int]
    highest: list[Place]
    lowest: list[Place]

    @classmethod
    def of(cls, part: int, values: pa.ChunkedArray) -> Confidences:
        """The confidences of one part, in the order of its rows."""
        bins = pc.min_element_wise(pc.floor(pc.multiply(values, BINS)), BINS - 1).cast(pa.int32())
        found = {each["values"]: each["counts"] for each in pc.value_counts(bins).to_pylist()}
        return cls(
            counts=[found.get(number, 0) for number in range(BINS)],
            highest=_extremes(part, values, "descending"),
            lowest=_extremes(part, values, "ascending"),
        )

    @classmethod
    def joined(cls, several: Iterable[Confidences]) -> Confidences:
        """Those of several parts, in their order."""
        counts, highest, lowest = [0] * BINS, [], []
        for each in several:
            counts = [a + b for a, b in zip(counts, each.counts, strict=True)]
            highest += each.highest
            lowest += each.lowest
        highest.sort(key=lambda place: -place.confidence)
        lowest.sort(key=lambda place: place.confidence)
        return cls(counts=counts, highest=highest[:EXTREMES], lowest=lowest[:EXTREMES])


class ConfidentRow(BaseModel):
    """A row of the weighted dataset; responses to a chat prompt are shown by their text."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    preferred: Preference
    confidence: float


class DatasetConfidences(BaseModel):
    """The distribution of a dataset's confidences, and the rows at its ends."""

    rows: int
    counts: list[int] = Field(
        description=f"rows in each of {BINS} intervals of confidence: from 0 to 1 in equal steps"
    )
    most_confident: list[ConfidentRow] = Field(description="the most confident one first")
    least_confident: list[ConfidentRow] = Field(description="the least confident one first")


def confident_rows(table: pa.Table, numbers: Sequence[int]) -> list[ConfidentRow]:
    """These rows of a part."""
    rows = table.take(pa.array(numbers, pa.int64())).to_pylist()
    for row in rows:
        row["chosen"] = response_text(row["chosen"])
        row["rejected"] = response_text(row["rejected"])
    return [ConfidentRow(**row) for row in rows]


def _extremes(part: int, values: pa.ChunkedArray, order: str) -> list[Place]:
    rows = pc.select_k_unstable(values, min(EXTREMES, len(values)), sort_keys=[("", order)])
    return [Place(part=part, row=row, confidence=values[row].as_py()) for row in rows.to_pylist()]
