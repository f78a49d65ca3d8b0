"""The pairs that people look at, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel

from cwpo.types import Preference, Prompt, Triplet


class ReviewPair(BaseModel):
    """A row of a weighted dataset, with its responses in the order of the input.

    annotator, confidence: the annotator's label of it; None where it is not known.
    """

    id: str
    prompt: Prompt
    response_a: str
    response_b: str
    annotator: Preference | None = None
    confidence: float | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Self:
        """The pair in a row of a weighted dataset.

        Raises: KeyError, pydantic.ValidationError for another row.
        """
        chosen, rejected = response_text(row["chosen"]), response_text(row["rejected"])
        is_b = row["preferred"] == "b"
        return cls(
            id=row["id"],
            prompt=row["prompt"],
            response_a=rejected if is_b else chosen,
            response_b=chosen if is_b else rejected,
            annotator=row["preferred"],
            confidence=row["confidence"],
        )

    @property
    def triplet(self) -> Triplet:
        """The row as it is annotated."""
        return Triplet(
            id=self.id,
            prompt=self.prompt,
            response_a=self.response_a,
            response_b=self.response_b,
        )

    @property
    def prompt_text(self) -> str:
        """The prompt as one text, with the roles of a chat."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"{turn.role}: {turn.content}" for turn in self.prompt)


class ReviewAnswer(ReviewPair):
    """What a person said of a pair."""

    preferred: Preference
    reviewer: str
    answered_at: datetime | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Equal for answers to the same pair."""
        return self.id, self.prompt_text, self.response_a, self.response_b


def response_text(response: str | list[dict[str, str]]) -> str:
    """The text of a response, which is a message where the prompt is a chat."""
    if isinstance(response, str):
        return response
    return "\n\n".join(turn["content"] for turn in response)
