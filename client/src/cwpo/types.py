"""The vocabulary of the REST contract, shared by every part: pydantic models only."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Truncation = Literal["error", "prompt_left"]
Priority = Literal["interactive", "batch"]
Preference = Literal["a", "b", "tie"]
FileFormat = Literal["jsonl", "jsonl.gz", "parquet"]
ResultFormat = Literal["parquet", "jsonl"]
JobState = Literal[
    "validating",
    "queued",
    "running",
    "finalizing",
    "completed",
    "completed_with_errors",
    "failed",
    "cancelling",
    "cancelled",
]

FINAL_STATES: frozenset[JobState] = frozenset(
    {"completed", "completed_with_errors", "failed", "cancelled"}
)


class _Model(BaseModel):
    # An unknown field is a misspelt one: refuse it rather than drop it.
    model_config = ConfigDict(extra="forbid")


class Message(_Model):
    """One turn of a chat prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | Annotated[list[Message], Field(min_length=1)]


class Triplet(_Model):
    """A prompt and the two responses to compare."""

    id: str | None = None
    prompt: Prompt
    response_a: str
    response_b: str


class Annotation(_Model):
    """The label of one triplet and how far to trust it.

    confidence is tanh(|score_a - score_b| / 2) (eq. 8) in [0, 1]; calibrated_confidence is the
    same at the checkpoint's calibration temperature, where it has one.
    """

    id: str
    preferred: Preference
    confidence: float
    score_a: float
    score_b: float
    truncated: bool = False
    calibrated_confidence: float | None = None


class ItemError(_Model):
    """Why one item could not be annotated; the others are unharmed."""

    code: Literal[
        "invalid_row",
        "empty_response",
        "invalid_text",
        "too_long",
        "response_too_long",
        "non_finite_score",
        "out_of_memory",
        "poison_row",
    ]
    detail: str


class FailedAnnotation(_Model):
    """Stands in an answer where an annotation could not be made."""

    id: str
    error: ItemError


class ModelRef(_Model):
    """Which annotator made an answer."""

    name: str
    revision: str


class ModelInfo(ModelRef):
    """What the service has loaded, and its limits."""

    backend: str
    device: str
    dtype: str
    max_length: int = Field(description="tokens a text, prompt and response together")
    max_triplets: int = Field(description="triplets a request")
    max_body_bytes: int = Field(description="bytes a request body")
    temperature: float | None = Field(None, description="calibration temperature")
    confidence_quantiles: list[float] | None = Field(
        None, description="of confidence on its held-out pairs, at 0, 0.1, ..., 1"
    )

    def ref(self) -> ModelRef:
        """Which annotator this is, without its limits."""
        return ModelRef(name=self.name, revision=self.revision)


class GoldenTriplet(Triplet):
    """A triplet whose label is known."""

    preferred: Literal["a", "b"]


class SwapRequest(_Model):
    """The body of POST /model."""

    annotator: str = Field(
        min_length=1,
        max_length=1024,
        description="checkpoint: a folder of the service, or a Hub id",
    )
    golden: Annotated[list[GoldenTriplet], Field(max_length=256)] = Field(
        [], description="triplets that it has to label so, or it is not taken"
    )


class Usage(_Model):
    """What a request cost."""

    triplets: int
    tokens: int


class AnnotateRequest(_Model):
    """The body of POST /annotate."""

    triplets: Annotated[list[Triplet], Field(min_length=1)]
    truncation: Truncation = "error"
    priority: Priority = "interactive"


class AnnotateResponse(_Model):
    """The answer of POST /annotate, in input order."""

    # Tried in order: to weigh each label against both takes twice the time.
    annotations: list[Annotated[Annotation | FailedAnnotation, Field(union_mode="left_to_right")]]
    model: ModelRef
    usage: Usage


class ScoreItem(_Model):
    """One response to score on its own."""

    prompt: Prompt
    response: str


class ScoreRequest(_Model):
    """The body of POST /score."""

    items: Annotated[list[ScoreItem], Field(min_length=1)]
    truncation: Truncation = "error"
    priority: Priority = "interactive"


class Score(_Model):
    """A raw annotator score (logit)."""

    score: float
    truncated: bool = False


class FailedScore(_Model):
    """Stands where an item could not be scored."""

    error: ItemError


class ScoreResponse(_Model):
    """The answer of POST /score, in input order."""

    scores: list[Score | FailedScore]
    model: ModelRef
    usage: Usage


class File(_Model):
    """An uploaded file of triplets."""

    id: str
    format: FileFormat
    bytes: int
    sha256: str
    created_at: datetime


MAX_REJECTED_SHARE = 0.5
RejectedShare = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="a job whose input has a larger share of invalid rows fails early; "
        "it is looked at from row 1,000 on",
    ),
]


class JobRequest(_Model):
    """The body of POST /jobs: an uploaded file, or an input that the service can read itself."""

    file_id: str | None = None
    input: str | None = Field(
        None,
        max_length=1024,
        description="path of a file below the service's --input-prefix, instead of file_id",
    )
    truncation: Truncation = "error"
    max_rejected_share: RejectedShare = MAX_REJECTED_SHARE

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.file_id is None) == (self.input is None):
            raise ValueError("name file_id of an upload, or input, a path on the service's side")
        return self


class JobProgress(_Model):
    """How far a job is. rows_total is unknown while the input is being validated."""

    rows_total: int | None = None
    rows_done: int = 0
    rows_annotated: int = 0
    rows_failed: int = 0
    rows_per_second: float | None = None
    eta_seconds: float | None = None


class Job(_Model):
    """A batch job."""

    id: str
    state: JobState
    file_id: str | None = None
    input: str | None = Field(None, description="path on the service's side, where none was sent")
    truncation: Truncation = "error"
    max_rejected_share: RejectedShare = MAX_REJECTED_SHARE
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    model: ModelRef | None = None
    progress: JobProgress = JobProgress()
    error: str | None = Field(None, description="why the job failed")


class JobList(_Model):
    """One page of jobs, newest first; pass next_cursor as cursor for the page after it."""

    jobs: list[Job]
    next_cursor: str | None = None


class Problem(BaseModel):
    """An error answer, RFC 9457 (application/problem+json)."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
