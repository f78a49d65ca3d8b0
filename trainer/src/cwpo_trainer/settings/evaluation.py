"""Settings of `cwpo evaluate annotator` and `cwpo evaluate policy`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from cwpo_trainer.settings.mixins import AnswerSampling, BadRows, Compute, DType, Settings
from cwpo_trainer.settings.unused_flags import refuse_if_set

JudgePrompt = Literal["chatbot", "summary"]


class LlmJudgeKey(BaseSettings):
    """The API key of an LLM judge, from CWPO_LLM_JUDGE_KEY: no flag, which others could read."""

    model_config = SettingsConfigDict(env_prefix="CWPO_LLM_JUDGE_")

    key: SecretStr | None = None


class AnnotatorEvaluation(BadRows, Compute):
    """Agreement of an annotator with human labels, and which of its labels can be trusted."""

    annotator: CliPositionalArg[str] = Field(description="Folder or Hub id of the annotator.")
    data: str = Field(
        description="Labelled pairs, as for `cwpo train-annotator`, that the annotator was neither "
        "trained nor calibrated on."
    )
    output: Path | None = Field(
        None,
        description="Folder to create for the figures and their page; by default they are only "
        "printed.",
    )
    max_error: float = Field(
        0.1, gt=0, lt=0.5, description="Largest share of wrong labels that a certificate allows."
    )
    delta: float = Field(
        0.05, gt=0, lt=0.5, description="Largest probability that a certificate is wrong."
    )
    certify: bool = Field(
        False,
        description="Keep the certificate in annotator.json in the annotator's folder, and fail if "
        "there is none.",
    )
    compare_with: Path | None = Field(
        None,
        description="File of triplets, labelled or not, such as those to annotate: how do the "
        "confidences on it differ? Not compared by default.",
    )
    suggest: int | None = Field(
        None,
        ge=1,
        description="Number of --compare-with's triplets that people should label next: unsure "
        "ones, spread over the data. They are written to OUTPUT/to_label.csv, which `cwpo review "
        "import` takes back.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="Number format of the annotator; `auto` picks bfloat16 on a GPU that has it, "
        "else float32. `int8` is for copies that `cwpo quantize` has written.",
    )

    @model_validator(mode="after")
    def _suggestions_have_a_source_and_a_place(self) -> Self:
        if self.suggest is not None and (self.compare_with is None or self.output is None):
            raise ValueError(
                "--suggest needs --compare-with, the triplets to pick from, and --output"
            )
        return self

    @model_validator(mode="after")
    def _certificate_has_a_place(self) -> Self:
        if self.certify and not Path(self.annotator).is_dir():
            raise ValueError(
                f"--certify writes into the annotator's folder, and {self.annotator} is none: "
                "download the annotator, and name the folder"
            )
        return self


class LlmJudging(Settings):
    """Win rate by a language model that compares answers."""

    llm_judge: str | None = Field(
        None,
        description="URL of an endpoint that speaks OpenAI's chat completions, such as "
        "https://api.openai.com/v1, whose model also compares answers; its API key is read from "
        "CWPO_LLM_JUDGE_KEY.",
    )
    llm_judge_model: str | None = Field(
        None, description="Name of the model that --llm-judge is to ask."
    )
    llm_judge_prompt: JudgePrompt = Field(
        "chatbot",
        description="What the LLM judge is asked: `chatbot` which response is more helpful and "
        "harmless, `summary` which summary of a post is better.",
    )
    llm_judge_against: Literal["chosen", "baseline"] = Field(
        "chosen",
        description="What the LLM judge compares each policy's answers with: the `chosen` "
        "responses of the labelled pairs in DATA, or the answers of the `baseline`.",
    )
    llm_judge_requests: int = Field(
        8, ge=1, description="Number of questions to the LLM judge at a time."
    )

    @model_validator(mode="after")
    def _llm_judge_is_on(self) -> Self:
        if self.llm_judge is None:
            names = ("llm_judge_model", "llm_judge_prompt", "llm_judge_against")
            refuse_if_set(self, (*names, "llm_judge_requests"), "needs --llm-judge")
        elif self.llm_judge_model is None:
            raise ValueError("--llm-judge needs --llm-judge-model: the name of the model to ask")
        return self


class PolicyEvaluation(LlmJudging, AnswerSampling, BadRows, Compute):
    """Comparison of aligned policies with their reference and with a baseline."""

    policy: CliPositionalArg[list[str]] = Field(
        min_length=1,
        description="Folders or Hub ids of aligned models; they may be LoRA adapters.",
    )
    reference: str = Field(
        description="Folder or Hub id of the SFT model that the policies started from; it may be a "
        "LoRA adapter."
    )
    baseline: str | None = Field(
        None,
        description="Folder or Hub id of the model that each policy is compared with, prompt by "
        "prompt, such as one aligned on human labels; by default the reference.",
    )
    judge: str = Field(
        description="Folder or Hub id of the reward model that scores answers; not the annotator "
        "that labelled the training data of the policies."
    )
    allow_annotator_as_judge: bool = Field(
        False,
        description="Let the annotator that labelled the training data judge all the same: wins "
        "then show that training worked, not that the answers are better.",
    )
    data: str = Field(
        description="Prompts that no policy was trained on: a file with a column prompt, or "
        "labelled pairs as for `cwpo train-annotator`, on which preferences are measured, too."
    )
    output: Path = Field(description="Folder to create for the figures and their page.")
    prompts: int = Field(
        500,
        ge=1,
        description="Number of DATA's prompts to answer, drawn at random, one of each "
        "conversation; always the same ones.",
    )
    temperature: float = Field(
        0.7, ge=0, description="Temperature of sampling; 0 always takes the likeliest token."
    )
    batch_size: int = Field(32, ge=1, description="Texts in a forward pass.")
    token_budget: int = Field(
        16384,
        ge=1,
        description="Maximum number of tokens of answers that are sampled at once, with their "
        "prompts, padding and all of --max-new-tokens.",
    )
    beta: float = Field(
        0.5, gt=0, description="Factor of the implicit reward; the --beta of `cwpo align`."
    )
    seed: int = Field(0, description="Seed of sampling, the same for every policy.")
    dtype: DType = Field(
        "auto",
        description="Number format of the models; `auto` keeps that in which they are stored, "
        "since a short alignment changes weights by less than bfloat16 resolves.",
    )
