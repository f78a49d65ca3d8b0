"""Settings of `cwpo online`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cwpo.types import Truncation
from cwpo_trainer.settings.mixins import AnswerSampling, BadRows, Compute, Configurable, DType
from cwpo_trainer.settings.unused_flags import refuse_if_set


class OnlineAlignment(AnswerSampling, BadRows, Compute, Configurable):
    """Alignment of a policy on its own answers."""

    model: str = Field(description="Folder or Hub id of the policy to start from.")
    prompts: Path = Field(
        description="Prompts to answer: a .jsonl, .jsonl.gz or .parquet file with a column prompt."
    )
    output: Path = Field(
        description="Folder to create: with a folder for each round in it, or with "
        "`--update immediate` for the trained policy."
    )
    align: Path | None = Field(
        None,
        description="YAML file of `cwpo align` settings for every round, or for the whole run "
        "with `--update immediate`; its model, data and output are ignored; without a file, the "
        "defaults of `cwpo align`.",
    )
    update: Literal["rounds", "immediate"] = Field(
        "rounds",
        description="When the policy learns from its answers: `rounds` samples and annotates those "
        "of a whole round, and then aligns the policy on them; `immediate` samples and annotates "
        "those of one optimiser step, and takes that step.",
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
    batch_size: int = Field(16, ge=1, description="Answers that transformers samples at once.")
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
        description="Drift above which a warning is printed: mean distance of the confidences from "
        "those on the annotator's held-out pairs.",
    )
    drift_window: int = Field(
        512,
        ge=1,
        description="Latest pairs over which `--update immediate` measures drift.",
    )
    dtype: DType = Field(
        "auto",
        description="Number format of the policy while it answers in rounds; `auto` keeps that in "
        "which it is stored. With `--update immediate` it is that of training.",
    )
    resume: bool = Field(
        False,
        description="Continue an interrupted run in --output, or add rounds.",
    )

    @model_validator(mode="after")
    def _update_has_what_is_set(self) -> Self:
        if self.update == "rounds":
            refuse_if_set(self, ("drift_window",), "needs --update immediate")
        else:
            of_rounds = ("rounds", "prompts_per_round", "reference", "dtype")
            refuse_if_set(self, of_rounds, "belongs to --update rounds")
            if self.sampler == "vllm":
                raise ValueError(
                    "--sampler vllm belongs to --update rounds: with immediate updates the weights "
                    "change in each step, and vLLM would have to load them anew; leave it out"
                )
            refuse_if_set(self, ("vllm_arguments",), "belongs to --update rounds")
        return self
