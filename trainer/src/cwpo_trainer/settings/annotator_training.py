"""Settings of `cwpo train-annotator`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cwpo_annotator.checkpoint import Objective
from cwpo_trainer.settings.mixins import (
    BadRows,
    Compute,
    DryRun,
    Epochs,
    GradientCheckpointing,
    LearningRate,
    LoraDropout,
    Optimisation,
    Settings,
    Training,
    WeightDecay,
)
from cwpo_trainer.settings.unused_flags import any_of, refuse_if_set

AnnotatorShardingName = Literal["none", "fsdp2"]

# What not all of the objectives have.
_OF_OBJECTIVES = {
    "beta": ("dpo", "sft+dpo"),
    "sft_epochs": ("sft+dpo",),
    "margin": ("bt",),
}


class AnnotatorObjective(Settings):
    """What an annotator is trained for."""

    objective: Objective = Field(
        "bt",
        description="Loss that the annotator is trained with. `bt`: a score for each response (eq. "
        "5 of the CW-PO paper); `dpo` and `sft+dpo`: a language model whose implicit reward is the "
        "score (eq. 17); `pairrm`: a score for both responses read together (eq. 20).",
    )
    beta: float = Field(
        0.5,
        gt=0,
        description="Strength of the pull towards the reference model (objectives dpo and "
        "sft+dpo).",
    )
    sft_epochs: float = Field(
        1,
        gt=0,
        description="Passes over the chosen responses before DPO starts (objective sft+dpo).",
    )
    margin: float = Field(
        0,
        ge=0,
        description="Score margin that the loss requires (objective bt).",
    )
    label_smoothing: float = Field(
        0, ge=0, lt=0.5, description="Share of the labels that are assumed to be wrong."
    )

    @model_validator(mode="after")
    def _objective_has_what_is_set(self) -> Self:
        for name, objectives in _OF_OBJECTIVES.items():
            if self.objective not in objectives:
                reason = f"belongs to --objective {any_of(objectives)}; {self.objective} has none"
                refuse_if_set(self, (name,), reason)
        return self


class EarlyStopping(Settings):
    """When the weights are validated, and training stops for it."""

    validate_every: int | None = Field(
        None, ge=1, description="Steps between validations; one after each epoch by default."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Validations without improvement after which training stops early; by default "
        "it does not stop early.",
    )


class AnnotatorData(BadRows):
    """The labelled pairs, and what each is used for."""

    data: str = Field(
        description="Labelled pairs: a .jsonl, .jsonl.gz or .parquet file, or a Hub id "
        "owner/name[/folder][@split]."
    )
    max_pairs: int | None = Field(
        None,
        ge=1,
        description="Maximum number of pairs of DATA to use, drawn at random by --seed; all "
        "by default.",
    )
    labelled_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share to train on of the pairs that are not held out; 0.3 in the paper.",
    )
    held_out_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of the pairs to measure the trained annotator on."
    )
    splits: Path | None = Field(
        None,
        description="Folder to write labelled.jsonl, unlabelled.jsonl and held_out.jsonl to; "
        "nothing is written by default.",
    )
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the labelled pairs to choose the best weights and the calibration "
        "temperature by; 0 trains on all, keeps the last weights and calibrates nothing.",
    )
    max_length: int = Field(
        1024,
        ge=2,
        description="Maximum number of tokens of prompt and response together; longer prompts lose "
        "their oldest tokens.",
    )


class AnnotatorTraining(
    DryRun,
    EarlyStopping,
    AnnotatorObjective,
    AnnotatorData,
    GradientCheckpointing,
    LoraDropout,
    Optimisation,
    Compute,
    Training,
):
    """Step (i): a small model trained on human labels as an annotator."""

    epochs: Epochs = 5
    learning_rate: LearningRate = 2e-5
    weight_decay: WeightDecay = 0.01
    batch_size: int = Field(
        32, ge=1, description="Pairs in an optimiser step, over all processes together."
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens in a forward pass of one process, unless a single "
        "pair has more: it sets memory and speed, not the result. By default 65,536 on a GPU and "
        "1,024 on a CPU; halved, and the step repeated, whenever a GPU runs out of memory.",
    )
    sharding: AnnotatorShardingName = Field(
        "none",
        description="How GPUs hold the model: `none`: each holds all of it; `fsdp2`: each holds a "
        "part of weights, gradients and optimiser state.",
    )
    schedule: Literal["linear", "cosine"] = Field(
        "cosine", description="Shape in which the learning rate falls to 0 after warm-up."
    )
    layers: int | None = Field(
        None,
        ge=1,
        description="Number of the model's first layers to keep, for a weaker and faster "
        "annotator; all by default.",
    )

    @model_validator(mode="after")
    def _something_is_validated_on(self) -> Self:
        if not self.validation_fraction:
            reason = "has nothing to validate on; leave --validation-fraction 0 out"
            refuse_if_set(self, ("validate_every", "patience"), reason)
        return self
