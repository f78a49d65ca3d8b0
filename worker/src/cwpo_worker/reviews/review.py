"""The vocabulary of reviews, as the REST contract shows it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cwpo.types import Preference, Prompt

MOST_ROWS = 2000

Reviewer = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=64),
    Field(description="name of the person who answers, as that person gives it"),
]


class ReviewRequest(BaseModel):
    """The body of POST /reviews."""

    model_config = ConfigDict(extra="forbid")

    job_id: str = Field(description="job whose dataset is reviewed")
    below: float = Field(
        0.1, gt=0, le=1, description="confidence, 0 to 1, below which a row is uncertain"
    )
    most: int = Field(500, ge=1, le=MOST_ROWS, description="largest number of rows")
    answers_per_row: int = Field(
        1, ge=1, le=5, description="people who answer each row; two or more show their agreement"
    )


class ReviewProgress(BaseModel):
    """How far a review is."""

    rows: int
    rows_done: int = Field(description="rows with as many answers as are wanted")
    answers: int
    reviewers: dict[str, int] = Field(description="answers of each person")


class Review(BaseModel):
    """Uncertain rows of a dataset, for people to label."""

    id: str
    job_id: str
    below: float
    most: int
    answers_per_row: int
    spread: bool = Field(
        description="whether its rows are unlike each other by the annotator's embeddings; they "
        "are drawn at random where it has none"
    )
    created_at: datetime
    progress: ReviewProgress


class ReviewRow(BaseModel):
    """A row to label, without what the annotator says of it."""

    number: int = Field(description="number of the row in the review, from 0")
    prompt: Prompt
    response_a: str
    response_b: str


class ReviewStep(BaseModel):
    """What a person is to answer next.

    row: None if nothing is left for this person; others may still hold the last rows.
    """

    row: ReviewRow | None
    progress: ReviewProgress


class TurnRequest(BaseModel):
    """The body of POST /reviews/{id}/next and /undo."""

    model_config = ConfigDict(extra="forbid")

    reviewer: Reviewer


class AnswerRequest(BaseModel):
    """The body of POST /reviews/{id}/answers."""

    model_config = ConfigDict(extra="forbid")

    reviewer: Reviewer
    number: int = Field(ge=0, description="number of the row")
    preferred: Preference
