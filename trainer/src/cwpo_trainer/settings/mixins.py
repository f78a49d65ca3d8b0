"""Groups of settings that commands share; a function that needs one group takes it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode

from cwpo_trainer.settings.unused_flags import refuse_if_set

DType = Literal["auto", "float32", "bfloat16"]
OptimizerName = Literal["adamw", "paged_adamw_32bit"]
ShardingName = Literal["none", "fsdp2", "zero3"]
SamplerName = Literal["auto", "transformers", "vllm"]


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


# In a file also a list; in the environment as on the command line.
Names = Annotated[list[str], NoDecode, BeforeValidator(_split), Field(min_length=1)]

Epochs = Annotated[float, Field(gt=0, description="Passes over the pairs.")]
LearningRate = Annotated[
    float, Field(gt=0, description="Peak learning rate of AdamW, after warm-up.")
]
WeightDecay = Annotated[float, Field(ge=0, description="Weight decay of AdamW.")]


class Settings(BaseModel, extra="forbid"):
    """Base of all: a name that is no setting is refused."""


class Configurable(Settings):
    """Settings that a file may hold."""

    config: Path | None = Field(
        None, description="YAML file of these settings; flags win over what it says."
    )


class Training(Configurable):
    """What every training needs: a model, a place for the result, and how a run goes on."""

    model: str = Field(description="Folder or Hub id of the model to start from.")
    output: Path = Field(description="Folder to create for the trained model.")
    dtype: DType = Field(
        "auto",
        description="Number format of forward and backward passes; `auto` picks bfloat16 where "
        "the hardware multiplies it natively, else float32.",
    )
    seed: int = Field(
        0, description="Seed of splits, of the order of the pairs, and of newly added weights."
    )
    world_size: int | None = Field(
        None,
        ge=1,
        description="Required number of processes, checked at the start; not checked by default.",
    )
    save_steps: int | None = Field(
        None,
        ge=0,
        description="Steps between checkpoints, of which the last two are kept until the end of "
        "the run; by default a tenth of all steps, but at least 200. 0 saves one only on SIGTERM.",
    )
    resume: bool = Field(
        False,
        description="Continue from the last checkpoint in --output, or start from the beginning if "
        "there is none.",
    )


class Compute(Settings):
    """How a process computes."""

    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each process; by default the processes share all cores.",
    )


class BadRows(Settings):
    """How many rows of an input may be bad."""

    max_rejected_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of bad rows in an input, 0 to 1, above which the run is refused; fewer "
        "are skipped, counted, and listed in rejected.jsonl in --output.",
    )


class AnswerSampling(Settings):
    """What every sampling of a policy's answers needs."""

    max_new_tokens: int = Field(
        256, ge=1, description="Maximum number of tokens of a sampled answer."
    )
    sampler: SamplerName = Field(
        "auto",
        description="What samples answers: `transformers` in this process, or `vllm` in one of its "
        "own; `auto` is vllm if --vllm-python is given or vLLM is installed here, else "
        "transformers.",
    )
    vllm_python: Path | None = Field(
        None,
        description="Python interpreter of an environment with vLLM; by default that of this "
        "environment, if vLLM is installed in it.",
    )
    vllm_arguments: str = Field(
        "",
        description="Additional command-line arguments of vLLM, such as --tensor-parallel-size.",
    )

    @model_validator(mode="after")
    def _arguments_have_vllm(self) -> Self:
        if self.sampler == "transformers":
            refuse_if_set(self, ("vllm_arguments",), "belongs to --sampler vllm")
        return self


class Lora(Settings):
    """Low-rank adapters in place of training all weights."""

    lora: bool = Field(
        False,
        description="Train a low-rank adapter (LoRA) instead of all weights, and merge it into the "
        "model at the end.",
    )
    lora_rank: int = Field(8, ge=1, description="Rank r of LoRA's two matrices.")
    lora_alpha: int = Field(
        16, ge=1, description="Scale of LoRA: its output is multiplied by alpha / rank."
    )

    lora_targets: Names = Field(
        ["all-linear"],
        description="Linear layers that get an adapter, by the names of their modules, such as "
        "q_proj,v_proj; `all-linear` is all of them but the head.",
    )

    @model_validator(mode="after")
    def _lora_is_on(self) -> Self:
        if not self.lora:
            refuse_if_set(self, ("lora_rank", "lora_alpha", "lora_targets"), "needs --lora")
        return self


class LoraDropout(Lora):
    """Adapters with dropout, in trainings that have any."""

    lora_dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout probability on LoRA's input while training."
    )

    @model_validator(mode="after")
    def _dropout_has_lora(self) -> Self:
        if not self.lora:
            refuse_if_set(self, ("lora_dropout",), "needs --lora")
        return self


class Optimisation(Settings):
    """How far and how fast AdamW goes.

    What has no default here has one in each training: what is best depends on the loss.
    """

    epochs: Epochs
    max_steps: int | None = Field(
        None, ge=1, description="Maximum number of optimiser steps; overrides --epochs."
    )
    learning_rate: LearningRate
    warmup_steps: int = Field(
        100,
        ge=0,
        description="Steps over which the learning rate rises to its peak; at most a tenth of all "
        "steps.",
    )
    weight_decay: WeightDecay
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Norm that larger gradients are scaled down to before each step; 0 never does.",
    )


class Evaluation(Settings):
    """Evaluation of a policy while it trains."""

    eval_data: Path | None = Field(
        None,
        description="File like DATA to evaluate on while training; its pairs are weighted as those "
        "of DATA are.",
    )
    eval_fraction: float = Field(
        0,
        ge=0,
        lt=1,
        description="Share of DATA's conversations to hold out for evaluation during training.",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations; one after each epoch by default."
    )
    keep_best: bool = Field(
        False,
        description="Keep the weights with the lowest evaluation loss rather than the last ones; "
        "each evaluation saves a checkpoint.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Evaluations without a lower loss after which training stops early; by default "
        "it does not stop early.",
    )

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.eval_data is not None or bool(self.eval_fraction)


class GradientCheckpointing(Settings):
    """Time spent to spare memory."""

    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass instead of storing them: less "
        "memory, more time.",
    )


class Memory(GradientCheckpointing):
    """What spares memory, at the price of time or exactness."""

    load_in_4bit: bool = Field(
        False,
        description="Hold the frozen weights in 4 bits (NF4, as in QLoRA); needs --lora and the "
        "package bitsandbytes.",
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="Optimiser; `paged_adamw_32bit` is AdamW whose state moves to main memory when "
        "the GPU is full, and needs the package bitsandbytes.",
    )


class Sharding(Settings):
    """How several GPUs hold one model."""

    sharding: ShardingName = Field(
        "none",
        description="How GPUs hold the model: `none`: each holds all of it (DDP); `fsdp2`, "
        "`zero3` (DeepSpeed): each holds a part.",
    )


class DryRun(Settings):
    """Whether a run is only planned."""

    dry_run: bool = Field(
        False,
        description="Print steps, tokens, memory, time and which GPUs the run fits on, without "
        "training.",
    )


class Publication(Settings):
    """Where a training is followed, and where its result goes."""

    report_to: Names = Field(
        ["none"],
        description="Experiment trackers to log to besides training.jsonl, of those that "
        "transformers knows, such as tensorboard,wandb; the run is named after --output.",
    )
    push_to_hub: str | None = Field(
        None,
        description="Hub repository, owner/name, to upload the trained model to; a new one is "
        "private.",
    )
