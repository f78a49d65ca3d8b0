"""Settings of `cwpo data split`, `poison`, `mix` and `draw`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from cwpo_trainer.settings.mixins import Settings

_ROUNDING = 1e-9


class Preparation(Settings):
    """What every command has that writes labelled pairs."""

    seed: int = Field(0, description="Seed of all that is drawn at random.")
    max_rejected_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of bad rows in an input, 0 to 1, above which the command is refused; "
        "fewer are skipped and counted.",
    )


class Splitting(Preparation):
    """Labelled pairs in three parts without a common conversation."""

    data: CliPositionalArg[str] = Field(
        description="Labelled pairs, as for `cwpo train-annotator`: a file or a Hub id."
    )
    output: Path = Field(
        description="Folder to create, with labelled.jsonl, unlabelled.jsonl and held_out.jsonl."
    )
    labelled_fraction: float = Field(
        0.3, gt=0, le=1, description="Share of the pairs that are not held out to label."
    )
    held_out_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of all pairs to hold out for measurements."
    )
    max_pairs: int | None = Field(
        None,
        ge=1,
        description="Maximum number of pairs of DATA to use, drawn at random; all by default.",
    )


class LabelledFile(Preparation):
    """Labelled pairs written to one file."""

    output: Path = Field(description="File to write: .jsonl, .jsonl.gz or .parquet.")


class Poisoning(LabelledFile):
    """Labelled pairs with wrong labels among them."""

    data: CliPositionalArg[str] = Field(
        description="Labelled pairs, as for `cwpo train-annotator`; with --surest a weighted "
        "dataset."
    )
    share: float = Field(gt=0, le=1, description="Share of the labels to flip.")
    surest: bool = Field(
        False,
        description="Flip the labels of the highest confidence rather than random ones, as an "
        "attack on the annotator would (App. J.8 of the paper).",
    )
    only_flipped: bool = Field(
        False, description="Leave out the pairs whose labels stay, to mix the others with `mix`."
    )


class Mixing(LabelledFile):
    """Labelled pairs of several sources in given shares."""

    sources: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        min_length=1,
        description="Source and its share of the pairs, such as harmless.jsonl=0.8; repeat the "
        "flag for each. The shares add up to 1.",
    )
    pairs: int | None = Field(
        None,
        ge=1,
        description="Number of pairs to write; by default as many as the sources have for these "
        "shares.",
    )

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        total = sum(self.sources.values())
        if abs(total - 1) > _ROUNDING:
            raise ValueError(f"--sources: the shares add up to {total:g}, not to 1")
        return self


class Drawing(LabelledFile):
    """Labels drawn at random from an annotator's probabilities."""

    data: CliPositionalArg[Path] = Field(
        description="Weighted dataset: a .parquet, .jsonl or .jsonl.gz file, or a folder of "
        "Parquet files."
    )
    noise: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="Expected share of labels that differ from the annotator's; a temperature of "
        "its scores is found for it. By default their temperature is 1.",
    )
