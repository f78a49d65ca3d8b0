"""Settings of `cwpo online`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cwpo.types import Truncation
from cwpo_trainer.settings.mixins import AnswerSampling, BadRows, Compute, Configurable, DType


class OnlineRounds(AnswerSampling, BadRows, Compute, Configurable):
    """Rounds of answering, annotating and aligning."""

    model: str = Field(description="Folder or Hub id of the policy to start from.")
    prompts: Path = Field(
        description="Prompts to answer: a .jsonl, .jsonl.gz or .parquet file with a column prompt."
    )
    output: Path = Field(description="Folder to create, with a folder for each round in it.")
    align: Path | None = Field(
        None,
        description="YAML file of `cwpo align` settings for every round; its model, "
        "data and output are ignored; without a file, the defaults of `cwpo align`.",
    )
    rounds: int = Field(3, ge=1, description="Rounds of answering, annotating and aligning.")
    reference: Literal["first", "round"] = Field(
        "first",
        description="Reference model of the loss: `first` is MODEL in all rounds, `round` what "
        "each round starts from.",
    )
    prompts_per_round: int | None = Field(
        None,
        ge=1,
        description="Prompts to answer in a round, taken in turn from all in shuffled order; all "
        "in every round by default.",
    )
    responses: int = Field(
        2,
        ge=2,
        description="Answers sampled for each prompt; of more than 2, those that score best and "
        "worst are paired.",
    )
    temperature: float = Field(0.9, gt=0, description="Temperature of sampling.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Probability mass of nucleus sampling: each token is drawn from the likeliest "
        "ones that together hold this share; 1 draws from all tokens.",
    )
    batch_size: int = Field(16, ge=1, description="Answers sampled at once.")
    seed: int = Field(0, description="Seed of the prompts' order and of sampling.")
    truncation: Truncation = Field(
        "error",
        description="Treatment of texts over the annotator's limit of tokens: `error` leaves the "
        "pair out, `prompt_left` drops the oldest tokens of the prompt.",
    )
    drift_limit: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Drift above which a round prints a warning: mean distance of the confidences "
        "from those on the annotator's held-out pairs.",
    )
    dtype: DType = Field(
        "auto",
        description="Number format of the policy while it answers; `auto` keeps that in which it "
        "is stored.",
    )
    resume: bool = Field(
        False,
        description="Continue an interrupted run in --output, or add rounds.",
    )
