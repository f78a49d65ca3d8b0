"""Settings of `cwpo push annotator` and `cwpo push dataset`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cwpo_trainer.settings.mixins import Settings


class AnnotatorPublication(Settings):
    """An annotator for the Hub."""

    annotator: CliPositionalArg[Path] = Field(
        description="Folder that `cwpo train-annotator` wrote."
    )
    repository: CliPositionalArg[str] = Field(
        description="Hub id, owner/name; created as a private repository if it is missing."
    )


class DatasetPublication(Settings):
    """A weighted dataset for the Hub."""

    data: CliPositionalArg[Path] = Field(
        description="Weighted dataset: a .parquet, .jsonl or .jsonl.gz file, or a folder of "
        "Parquet files."
    )
    repository: CliPositionalArg[str] = Field(
        description="Hub id, owner/name; created as a private repository if it is missing."
    )
    license: str | None = Field(
        None,
        description="Licence of the texts by the Hub's name, such as cc-by-4.0; by default the "
        "card says that it is to be filled in.",
    )
