"""Settings of `cwpo reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from cwpo_trainer.settings.mixins import Compute

ScaleName = Literal["small", "paper"]


class LocalData(BaseSettings):
    """Where preference data lies on this machine, as the environment says (CWPO_DATA_DIR)."""

    model_config = SettingsConfigDict(env_prefix="CWPO_")

    data_dir: Path | None = None


def _local_data() -> Path | None:
    return LocalData().data_dir


class Reproduction(Compute):
    """A table or figure of the paper, made anew."""

    name: CliPositionalArg[str | None] = Field(
        None, description="Name of a recipe, such as table-1; --list shows all."
    )
    list: bool = Field(False, description="Show all recipes, with the time expected of each.")
    scale: ScaleName = Field(
        "small",
        description="Size of models and data: `small` runs on a few CPU cores, with models from "
        "--models and files from --data; `paper` has the paper's models and data sets.",
    )
    data: Path | None = Field(
        default_factory=_local_data,
        description="Folder of labelled pairs, one file a data set, such as hh_harmless.jsonl.gz; "
        "by default that of the environment variable CWPO_DATA_DIR. For `--scale paper`, a file "
        "here takes the place of a data set of the Hub.",
    )
    models: Path = Field(
        Path("models"), description="Folder of the models minilm and smollm2 (`--scale small`)."
    )
    seeds: int = Field(3, ge=1, description="Number of seeds, from 0 on, to run each row with.")
    parallel: int = Field(
        1,
        ge=1,
        description="Commands that run at the same time, each with its share of the cores; two "
        "are done earlier so than one after the other. --scale paper has one at a time.",
    )
    output: Path = Field(
        Path("runs/reproduction"),
        description="Folder of everything that is made; recipes share what they have in common.",
    )
    llm_judge: str | None = Field(
        None,
        description="URL of an endpoint that speaks OpenAI's chat completions, whose model "
        "compares answers for table-17, which cannot be run without; its API key is read from "
        "CWPO_LLM_JUDGE_KEY.",
    )
    llm_judge_model: str | None = Field(
        None, description="Name of the model that --llm-judge is to ask; GPT-4 in the paper."
    )
    dry_run: bool = Field(
        False, description="Check the settings of every row, and print its commands."
    )

    show: bool = Field(
        False,
        description="Print the table of the results that --output holds already, and run nothing: "
        "neither data nor models are needed.",
    )

    @model_validator(mode="after")
    def _something_is_wanted(self) -> Self:
        if self.name is None and not self.list:
            raise ValueError("name a recipe, or see all with --list")
        if self.parallel > 1 and self.scale == "paper":
            raise ValueError("--parallel is for --scale small: commands would share the GPUs")
        if (self.llm_judge is None) != (self.llm_judge_model is None):
            raise ValueError("--llm-judge and --llm-judge-model need each other")
        return self
