"""Settings of `cwpo sft` and `cwpo align`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    Field,
    JsonValue,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from cwpo_trainer.constants import HasConstants, names_by_constant
from cwpo_trainer.losses import EPSILON, LOSSES, LossName
from cwpo_trainer.settings.mixins import (
    BadRows,
    Compute,
    DryRun,
    Epochs,
    Evaluation,
    LearningRate,
    Lora,
    LoraDropout,
    Memory,
    Optimisation,
    Publication,
    Settings,
    Sharding,
    Training,
    WeightDecay,
)
from cwpo_trainer.settings.unused_flags import flag, refuse_if_set, refuse_other_constants
from cwpo_trainer.soft_labels import SOFT_LABELS, ConfidenceUse
from cwpo_trainer.weights import WEIGHTS, WeightName

Labels = Literal["annotator", "human"]
WeightBy = Literal["prompt", "pair"]
ScheduleName = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
AttentionName = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]
S = TypeVar("S", bound=Settings)


def _auto_or(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    return value if value == "auto" else validate(value)


if TYPE_CHECKING:
    Epsilon = float
else:
    # A union would name its members, not the flag, in what it says of a wrong value.
    Epsilon = Annotated[EPSILON.kind, WrapValidator(_auto_or)]


class PolicyTraining(Sharding, Memory, Lora, Optimisation, Training):
    """How the strong model is trained, whatever it is trained on."""

    model: str = Field(
        description="Folder or Hub id of the model to start from; with --lora, a LoRA adapter is "
        "trained further."
    )
    adapter_only: bool = Field(
        False,
        description="Write the trained LoRA adapter alone, without merging it into the model; "
        "needs --lora.",
    )
    share_prompts: bool = Field(
        True,
        description="Read texts in rows without padding, and a prompt once for all of its "
        "responses in a row; with --no-share-prompts, and with models that do not allow it, each "
        "text is read by itself, padded.",
    )

    batch_size: int = Field(16, ge=1, description="Pairs in a forward pass on each device.")
    gradient_accumulation: int = Field(
        4, ge=1, description="Forward passes whose gradients are summed for one optimiser step."
    )
    weight_decay: WeightDecay = 0.05
    schedule: ScheduleName = Field(
        "cosine",
        description="Course of the learning rate, as transformers names it: `cosine` and `linear` "
        "fall to 0 after warm-up, `constant` has no warm-up; --set lr_scheduler_kwargs=... has the "
        "constants of the others.",
    )
    logging_steps: int = Field(
        1,
        ge=1,
        description="Steps between lines of training.jsonl, which are means over these steps; "
        "evaluations and the end have a line in any case.",
    )
    attn_implementation: AttentionName | None = Field(
        None,
        description="Attention of policy and reference, as transformers names it; its choice by "
        "default. Needs --no-share-prompts, since rows of texts have an attention of their own.",
    )
    set: dict[str, JsonValue] = Field(
        {},
        description="Argument of the trainer that has no flag here, by its name in transformers' "
        "TrainingArguments or TRL's SFTConfig or DPOConfig, such as adam_beta2=0.95; repeat the "
        "flag for more (in a file: a mapping).",
    )

    @model_validator(mode="after")
    def _run_has_what_is_set(self) -> Self:
        if self.schedule == "constant":
            reason = "has no effect with --schedule constant; use constant_with_warmup"
            refuse_if_set(self, ("warmup_steps",), reason)
        if self.share_prompts and self.attn_implementation is not None:
            raise ValueError(
                "--attn-implementation has no effect on rows of texts, which have an attention of "
                "their own; add --no-share-prompts"
            )
        return self


class PolicyData(BadRows):
    """What the strong model is trained on."""

    data: Path = Field(
        description="Weighted dataset: a .parquet or .jsonl file, or the folder of parts to which "
        "a job was downloaded.",
    )
    labels: Labels = Field(
        "annotator",
        description="Source of the labels in DATA: `annotator` for a weighted dataset, `human` for "
        "labelled pairs, each of weight 1 (the baseline).",
    )
    max_length: int = Field(
        1024,
        ge=2,
        description="Maximum number of tokens of prompt and response together; longer pairs are "
        "left out.",
    )
    annotator: str | None = Field(
        None,
        description="Annotator that must have written DATA, by folder, Hub id or revision; a file "
        "by another annotator, or one that does not name its annotator (JSONL), is refused; not "
        "checked by default.",
    )


class PolicyStep(DryRun, Publication, Evaluation, PolicyData, Compute, PolicyTraining):
    """What SFT and alignment of the strong model share."""


class FineTuning(LoraDropout, PolicyStep):
    """Step (iii), first half: the strong model on the chosen responses."""

    epochs: Epochs = 3
    learning_rate: LearningRate = 2e-5


_LOSSES = ", ".join(f"`{name}` ({loss.source})" for name, loss in LOSSES.items())
_WEIGHTS = ", ".join(f"`{name}` ({weight.meaning})" for name, weight in WEIGHTS.items())
_SOFT_LABELS = ", ".join(f"`{name}` ({soft.meaning})" for name, soft in SOFT_LABELS.items())
_REFERENCE_FREE = " and ".join(name for name, loss in LOSSES.items() if not loss.reads_reference)


def _with_constants(
    choice: str, registry: Mapping[str, HasConstants]
) -> Callable[[type[S]], type[S]]:
    """A class decorator: adds a setting for each constant of the losses or weights in a registry.

    Args:
        choice: the flag that chooses one of them.
    """
    fields: dict[str, Any] = {
        constant.flag: (
            constant.kind,
            Field(
                constant.default,
                description=f"{constant.meaning} (--{choice} {', '.join(names)}).",
            ),
        )
        for constant, names in names_by_constant(registry).items()
    }

    def with_fields(settings: type[S]) -> type[S]:
        return create_model(
            settings.__name__,
            __base__=settings,
            __doc__=settings.__doc__,
            __module__=settings.__module__,
            **fields,
        )

    return with_fields


@_with_constants("loss", LOSSES)
class PairLoss(Settings):
    """The loss of a pair, with its constants and its reference model."""

    loss: LossName = Field(
        "dpo",
        description=f"Loss of a pair: {_LOSSES}; the equations are those of the CW-PO paper. "
        f"Without a reference model: {_REFERENCE_FREE}.",
    )
    reference: str | None = Field(
        None,
        description="Folder or Hub id of the reference model; the model to start from by default.",
    )
    precompute_reference: bool = Field(
        False,
        description="Run the reference model over all pairs once before training, rather than in "
        "every step.",
    )
    reference_cache: Path | None = Field(
        None,
        description="Folder, created if missing, in which runs keep the log-probabilities of the "
        "reference model: it reads no pair again that it has read in another run. Implies "
        "--precompute-reference; without it, nothing is kept.",
    )

    @model_validator(mode="after")
    def _loss_has_what_is_set(self) -> Self:
        """Also takes a constant by the name that TRL has for it: --beta for the tau of ipo."""
        refuse_other_constants(self, "loss", LOSSES)
        for constant in LOSSES[self.loss].constants:
            own, of_trl = constant.flag, constant.config_field
            if own == of_trl or of_trl not in self.model_fields_set:
                continue
            value = getattr(self, of_trl)
            if own in self.model_fields_set and getattr(self, own) != value:
                raise ValueError(
                    f"{flag(of_trl)} is another name of {flag(own)} for --loss {self.loss}: "
                    "give one of them"
                )
            setattr(self, own, value)
        return self

    @property
    def precomputes_reference(self) -> bool:
        """Whether the reference model reads the pairs before training."""
        return self.precompute_reference or self.reference_cache is not None

    @property
    def reads_reference(self) -> bool:
        """Whether the loss compares the policy with a reference model."""
        return LOSSES[self.loss].reads_reference


@_with_constants("weight", WEIGHTS)
class Weighting(Settings):
    """The weight of a pair, with its constants."""

    weight: WeightName = Field(
        "confidence",
        description=f"Weight of each pair in the loss, from its confidence C: {_WEIGHTS}.",
    )
    calibrated: bool = Field(
        False,
        description="Weight pairs by the column calibrated_confidence instead of confidence; "
        "annotators with a calibration temperature write it.",
    )
    weight_by: WeightBy = Field(
        "prompt",
        description="What counts as one in a dataset with several pairs of a prompt (column "
        "`prompt_pairs`): `prompt` divides the weight of each pair by the number of pairs of its "
        "prompt, `pair` does not.",
    )
    normalise: bool = Field(
        False,
        description="Divide the weights by their mean, so that they are 1 on average. Under AdamW "
        "this changes no step but those whose gradients --max-grad-norm clips.",
    )

    @model_validator(mode="after")
    def _weight_has_what_is_set(self) -> Self:
        refuse_other_constants(self, "weight", WEIGHTS)
        weight = WEIGHTS[self.weight]
        if self.calibrated and not weight.reads_confidence:
            raise ValueError(f"--calibrated: --weight {self.weight} reads no confidence")
        if self.normalise and weight.selects:
            raise ValueError(f"--normalise: --weight {self.weight} only selects pairs")
        return self


class Alignment(Weighting, PairLoss, PolicyStep):
    """Step (iii), second half: the strong model on weighted preferences."""

    confidence_as: ConfidenceUse = Field(
        "weight",
        description="What the confidence C of a pair is in its loss: `weight`, as --weight says, "
        f"or with --loss dpo its epsilon: {_SOFT_LABELS}. Each pair has the weight 1 then.",
    )
    epsilon: Epsilon = Field(
        EPSILON.default,
        description=f"{EPSILON.meaning} (--loss {', '.join(names_by_constant(LOSSES)[EPSILON])}). "
        "`auto` with --weight certified: the share of wrong labels that the certificate measured.",
    )
    epochs: Epochs = 5
    learning_rate: LearningRate = 5e-6

    @model_validator(mode="after")
    def _epsilon_is_measured_of_what_is_trained_on(self) -> Self:
        if self.measures_epsilon and not WEIGHTS[self.weight].reads_certified:
            raise ValueError("--epsilon auto is that of certified labels; add --weight certified")
        return self

    @property
    def measures_epsilon(self) -> bool:
        """Whether epsilon is to be taken from the certificate of the data."""
        return isinstance(self.epsilon, str)

    @model_validator(mode="after")
    def _confidence_has_one_use(self) -> Self:
        """Makes of dpo the loss that takes the confidence as its epsilon, and weights nothing."""
        if self.confidence_as == "weight":
            return self
        soft = SOFT_LABELS[self.confidence_as]
        if self.labels == "human":
            raise ValueError(f"--confidence-as {self.confidence_as}: human labels have none")
        if self.loss not in ("dpo", soft.loss):
            raise ValueError(
                f"--confidence-as {self.confidence_as} makes --loss {soft.loss} of dpo; "
                f"{self.loss} takes no confidence but as a weight"
            )
        use = f"--confidence-as {self.confidence_as} is set"
        refuse_if_set(self, ("epsilon",), f"has no effect: {use}, by which each pair has its own")
        if "weight" in self.model_fields_set and self.weight != "none":
            raise ValueError(f"--weight {self.weight}: {use}, by which each pair has the weight 1")
        self.loss, self.weight = soft.loss, "none"
        return self
