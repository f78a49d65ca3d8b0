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
Merge = Literal["auto", "never"]
Pairs = Literal["best_worst", "adjacent", "all"]
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


class _Sent(BaseModel):
    # An unknown field is a misspelt one: refuse it rather than drop it.
    model_config = ConfigDict(extra="forbid")


class _Answered(BaseModel):
    # A newer service may tell more, which an older client passes over.
    model_config = ConfigDict(extra="ignore")


class Message(_Sent):
    """One turn of a chat prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


# One mistake in a long list tells enough: to find them all could take seconds.
Prompt = str | Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class Triplet(_Sent):
    """A prompt and the two responses to compare."""

    id: str | None = None
    prompt: Prompt
    response_a: str
    response_b: str


class Annotation(_Answered):
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


class ItemError(_Answered):
    """Why one item could not be annotated; the others are unharmed."""

    code: Literal[
        "invalid_row",
        "empty_response",
        "invalid_text",
        "too_long",
        "response_too_long",
        "too_large",
        "non_finite_score",
        "out_of_memory",
        "poison_row",
    ]
    detail: str


class FailedAnnotation(_Answered):
    """Stands in an answer where an annotation or a ranking could not be made."""

    id: str
    error: ItemError


class ModelRef(_Answered):
    """Which annotator made an answer."""

    name: str
    revision: str


class Certificate(_Answered):
    """Labels of an annotator that can be trusted, as `cwpo evaluate annotator --certify` found.

    Of the labels with a confidence above the threshold, at most a share of max_error is wrong, with
    probability 1 - delta. It holds for data exchangeable with the labelled pairs that it was found
    on, and for no other.
    """

    max_error: float = Field(description="largest share of wrong labels")
    delta: float = Field(description="largest probability that the certificate is wrong")
    threshold: float = Field(description="the labels with a confidence above it are certified")
    coverage: float = Field(description="share of the pairs that are above the threshold")
    pairs: int = Field(description="labelled pairs above the threshold, one of each conversation")
    errors: int = Field(description="how many of their labels are wrong")
    data_fingerprint: str | None = Field(None, description="of the labelled pairs")


class ModelInfo(ModelRef):
    """What the service has loaded, and its limits."""

    backend: str
    device: str
    dtype: str
    max_length: int = Field(description="tokens a text, prompt and response together")
    max_triplets: int = Field(description="triplets a request")
    max_body_bytes: int = Field(description="bytes a request body")
    max_merged_rows: int | None = Field(
        None, description="rows of a job above which its dataset is a folder of parts only"
    )
    max_merged_bytes: int | None = Field(
        None, description="bytes of all parts of a job above which its dataset is parts only"
    )
    temperature: float | None = Field(None, description="calibration temperature")
    confidence_quantiles: list[float] | None = Field(
        None, description="of confidence on its held-out pairs, at 0, 0.1, ..., 1"
    )
    certificates: list[Certificate] = Field(
        [], description="which of its labels can be trusted, on data like that they were found on"
    )
    certificates_void: str | None = Field(
        None, description="why none of the certificates holds at present"
    )

    def ref(self) -> ModelRef:
        """Which annotator this is, without its limits."""
        return ModelRef(name=self.name, revision=self.revision)


class ModelChange(ModelInfo):
    """What one replica of the service has loaded after POST /model."""

    replica: str = Field(description="host name of the one that changed; others keep what they had")


class GoldenTriplet(Triplet):
    """A triplet whose label is known."""

    preferred: Literal["a", "b"]


MAX_GOLDEN = 256


class SwapRequest(_Sent):
    """The body of POST /model."""

    annotator: str = Field(
        min_length=1,
        max_length=1024,
        description="checkpoint: a folder of the service, or a Hub id",
    )
    golden: Annotated[list[GoldenTriplet], Field(max_length=MAX_GOLDEN)] = Field(
        [], description="triplets that it has to label so, or it is not taken"
    )


class Usage(_Answered):
    """The size of a request: tokens of all texts, each counted as if it was read by itself."""

    triplets: int = Field(description="triplets, or items of another request")
    tokens: int


class AnnotateRequest(_Sent):
    """The body of POST /annotate."""

    triplets: Annotated[list[Triplet], Field(min_length=1, fail_fast=True)]
    truncation: Truncation = "error"
    priority: Priority = "interactive"


class AnnotateResponse(_Answered):
    """The answer of POST /annotate, in input order."""

    # Tried in order: to weigh each label against both takes twice the time.
    annotations: list[Annotated[Annotation | FailedAnnotation, Field(union_mode="left_to_right")]]
    model: ModelRef
    usage: Usage


class ScoreItem(_Sent):
    """One response to score on its own."""

    prompt: Prompt
    response: str


class ScoreRequest(_Sent):
    """The body of POST /score."""

    items: Annotated[list[ScoreItem], Field(min_length=1, fail_fast=True)]
    truncation: Truncation = "error"
    priority: Priority = "interactive"


class Score(_Answered):
    """A raw annotator score (logit)."""

    score: float
    truncated: bool = False


class FailedScore(_Answered):
    """Stands where an item could not be scored."""

    error: ItemError


class ScoreResponse(_Answered):
    """The answer of POST /score, in input order."""

    scores: list[Score | FailedScore]
    model: ModelRef
    usage: Usage


class Embedding(_Answered):
    """What the annotator's model makes of a triplet: the mean of its last hidden states."""

    id: str
    embedding: list[float] = Field(description="rounded to four decimals")
    truncated: bool = False


class EmbedResponse(_Answered):
    """The answer of POST /embed, in input order."""

    embeddings: list[Embedding | FailedAnnotation]
    model: ModelRef
    usage: Usage


MIN_RESPONSES = 2
MAX_RESPONSES = 64


class RankItem(_Sent):
    """A prompt and the responses to rank."""

    id: str | None = None
    prompt: Prompt
    responses: Annotated[
        list[str],
        Field(min_length=MIN_RESPONSES, max_length=MAX_RESPONSES, fail_fast=True),
    ]


class RankRequest(_Sent):
    """The body of POST /rank."""

    items: Annotated[list[RankItem], Field(min_length=1, fail_fast=True)]
    truncation: Truncation = "error"
    priority: Priority = "interactive"


class Ranking(_Answered):
    """The order of an item's responses, and how far to trust it.

    order has the indices of the responses, the best one first; equal scores keep the order in which
    they were sent. confidence is that of each response of this order against the next one, as of a
    triplet (eq. 8), and so has one value less; calibrated_confidence is the same at the
    checkpoint's calibration temperature, where it has one.
    """

    id: str
    order: list[int]
    scores: list[float] = Field(description="raw scores (logits), in the order of the responses")
    confidence: list[float]
    truncated: bool = False
    calibrated_confidence: list[float] | None = None


class RankResponse(_Answered):
    """The answer of POST /rank, in input order."""

    rankings: list[Annotated[Ranking | FailedAnnotation, Field(union_mode="left_to_right")]]
    model: ModelRef
    usage: Usage
    temperature: float | None = Field(
        None, description="calibration temperature, for the confidence of responses further apart"
    )


class File(_Answered):
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

MAX_JOB_FILES = 1000
FileIds = Annotated[
    list[str],
    Field(
        min_length=1,
        max_length=MAX_JOB_FILES,
        fail_fast=True,
        description="uploads that are annotated as one input, in this order, instead of file_id",
    ),
]

MergeChoice = Annotated[
    Merge,
    Field(
        description="auto: the dataset is also one file, in both formats, unless it is larger than "
        "max_merged_rows or max_merged_bytes of GET /model; never: it is a folder of parts only",
    ),
]


JobPriority = Annotated[
    Priority,
    Field(description="whether the job goes before the other jobs of the same API key"),
]


PairsChoice = Annotated[
    Pairs | None,
    Field(
        description="pairs of the dataset for each row that holds `responses`, which are ranked; "
        "best_worst: the best and the worst response; adjacent: each response and the next one in "
        "the ranking; all: each two responses. Without it, such rows are rejected",
    ),
]


MaxError = Annotated[
    float | None,
    Field(
        gt=0,
        lt=0.5,
        description="adds the column certified, true above the threshold of the annotator's "
        "certificate of this max_error",
    ),
]


class JobRequest(_Sent):
    """The body of POST /jobs: uploaded files, or an input that the service can read itself."""

    file_id: str | None = None
    file_ids: FileIds | None = None
    input: str | None = Field(
        None,
        max_length=1024,
        description="path of a file below the service's --input-prefix, instead of file_id",
    )
    prefix: str | None = Field(
        None,
        max_length=1024,
        description="path of a folder below the service's --input-prefix, whose files of triplets "
        "are annotated as one input, in the order of their names",
    )
    truncation: Truncation = "error"
    max_rejected_share: RejectedShare = MAX_REJECTED_SHARE
    priority: JobPriority = "batch"
    merge: MergeChoice = "auto"
    pairs: PairsChoice = None
    max_error: MaxError = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        inputs = (self.file_id, self.file_ids, self.input, self.prefix)
        if sum(given is not None for given in inputs) != 1:
            raise ValueError(
                "give either file_id, the id of an upload, or input, a path below --input-prefix, "
                "or file_ids, the ids of several uploads, or prefix, a folder below --input-prefix"
            )
        return self


class JobProgress(_Answered):
    """How far a job is. rows_total is unknown until the whole input is read and checked."""

    rows_total: int | None = None
    rows_done: int = 0
    rows_annotated: int = 0
    rows_failed: int = 0
    pairs_annotated: int | None = Field(
        None, description="rows of the dataset, of a job that names `pairs`; the others count input"
    )
    rows_per_second: float | None = None
    eta_seconds: float | None = None


class JobWait(_Answered):
    """Why a job does not go on: no replica of the service hosts its annotator."""

    since: datetime
    reason: str = Field(description="what the service answered first")


class Job(_Answered):
    """A batch job."""

    id: str
    state: JobState
    file_id: str | None = None
    file_ids: list[str] | None = Field(None, description="uploads, where there are several")
    input: str | None = Field(None, description="path on the service's side, where none was sent")
    prefix: str | None = Field(None, description="folder on the service's side, of several inputs")
    truncation: Truncation = "error"
    max_rejected_share: RejectedShare = MAX_REJECTED_SHARE
    priority: JobPriority = "batch"
    merge: MergeChoice = "auto"
    pairs: PairsChoice = None
    max_error: MaxError = None
    certificate: Certificate | None = Field(
        None, description="of max_error, as its annotator had it when the job was submitted"
    )
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    model: ModelRef | None = Field(
        None, description="annotator of all rows, which is that of the first answer"
    )
    waiting: JobWait | None = Field(None, description="while no replica hosts its annotator")
    progress: JobProgress = JobProgress()
    error: str | None = Field(None, description="why the job failed")


class JobList(_Answered):
    """One page of jobs, newest first; pass next_cursor as cursor for the page after it."""

    jobs: list[Job]
    next_cursor: str | None = None


class DatasetColumn(_Answered):
    """A column of a weighted dataset."""

    name: str
    type: str = Field(description="as Arrow writes it, such as string or float")


class DatasetPart(_Answered):
    """A Parquet file with some rows of a weighted dataset."""

    name: str
    rows: int
    bytes: int
    sha256: str
    url: str | None = Field(
        None, description="presigned: downloads the part from the store for a while, without a key"
    )


class DatasetParts(_Answered):
    """A page of a dataset's parts, in the order of their rows; the totals are of all pages.

    Pass next_cursor as cursor for the page after it.
    """

    model_config = ConfigDict(populate_by_name=True)

    parts: list[DatasetPart]
    columns: list[DatasetColumn] = Field(alias="schema", description="of every part")
    rows: int
    bytes: int
    next_cursor: str | None = None


class Problem(BaseModel):
    """An error answer, RFC 9457 (application/problem+json)."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    reason: str | None = Field(None, description="what is wrong, as one word for programs")
