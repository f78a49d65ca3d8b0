"""`cwpo train-annotator`, `sft`, `align`, `online`, `evaluate` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliSubCommand

from cwpo.cli import Command
from cwpo.commands import ServiceCommand
from cwpo.types import Truncation
from cwpo_trainer.runtime import DType


class _Training(Command):
    """What all training commands share."""

    config: Path | None = Field(None, description="YAML file of these settings; flags win over it")
    model: str = Field(description="folder or Hub id of the model to start from")
    output: Path = Field(description="folder to create")
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps")
    warmup_steps: int = Field(100, ge=0, description="at most; never over a tenth of the steps")
    seed: int = Field(0, description="of the split, the order of the pairs and new weights")
    dtype: DType = Field("auto", description="of the arithmetic; auto: bfloat16 where it is native")
    threads: int | None = Field(None, ge=1, description="of the CPU; all there are by default")
    world_size: int | None = Field(
        None, ge=1, description="processes that have to take part, checked at the start"
    )
    save_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints; by default SIGTERM alone saves one"
    )
    resume: bool = Field(
        False, description="go on from the last checkpoint of this --output, from the start if none"
    )


class TrainAnnotator(_Training):
    """Train a small model on human labels as an annotator.

    DATA holds labelled pairs; all pairs of one prompt stay on one side of every split. A share is
    held out and measured at the end; --labelled-fraction below 1 leaves the rest unlabelled, and
    --splits writes the three parts for the next steps. Of the labelled pairs a share validates:
    the best weights are kept, and their temperature is fitted and written to annotator.json.

    Example:
        cwpo train-annotator --model models/minilm --data pairs.jsonl --output runs/annotator
    """

    data: str = Field(
        description=".jsonl, .jsonl.gz or .parquet of labelled pairs, or a Hub id "
        "owner/name[/folder][@split]"
    )
    objective: Literal["bt", "dpo", "sft+dpo", "pairrm"] = Field(
        "bt",
        description="bt: a score of each response, eq. 5; dpo, sft+dpo: a language model's "
        "implicit reward, eq. 17; pairrm: both responses read together, eq. 20",
    )
    beta: float = Field(0.5, gt=0, description="of dpo, sft+dpo: how dear it is to leave the start")
    sft_epochs: float = Field(
        1, gt=0, description="of sft+dpo: passes over the chosen responses first"
    )
    max_pairs: int | None = Field(
        None, ge=1, description="use at most so many pairs, drawn at random by the seed"
    )
    labelled_fraction: float = Field(
        1.0, gt=0, le=1, description="share to train on of what is not held out; 0.3 in the paper"
    )
    held_out_fraction: float = Field(0.1, ge=0, lt=1, description="share to measure on")
    splits: Path | None = Field(
        None, description="folder for labelled.jsonl, unlabelled.jsonl and held_out.jsonl"
    )
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the labelled pairs that is not trained on: it chooses the best "
        "weights and the calibration temperature; 0 trains on all and calibrates nothing",
    )
    validate_every: int | None = Field(
        None, ge=1, description="steps between validations; an epoch by default"
    )
    patience: int | None = Field(
        None, ge=1, description="validations without a better one before training stops early"
    )
    margin: float = Field(
        0, ge=0, description="of bt: what the scores have to differ by, in the loss"
    )
    label_smoothing: float = Field(
        0, ge=0, lt=0.5, description="share of labels that the loss takes to be flipped"
    )
    layers: int | None = Field(
        None, ge=1, description="keep the first so many layers: a weaker, faster annotator"
    )
    lora: bool = Field(
        False, description="train a low-rank adapter and any new head, merged in the end"
    )
    lora_rank: int = Field(8, ge=1, description="r of LoRA")
    lora_alpha: int = Field(16, ge=1, description="alpha of LoRA")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="of LoRA")
    epochs: float = Field(5, gt=0, description="passes over the pairs")
    batch_size: int = Field(32, ge=1, description="pairs a step, on all devices together")
    learning_rate: float = Field(2e-5, gt=0, description="peak of AdamW's")
    schedule: Literal["linear", "cosine"] = Field("cosine", description="after the warm-up")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    max_length: int = Field(1024, ge=2, description="tokens a text; longer prompts are cut")

    def cli_cmd(self) -> None:
        """Train."""
        from cwpo_trainer import train_annotator

        train_annotator.run(self)


class PolicyTraining(_Training):
    """What sft and align share."""

    data: Path = Field(description="weighted dataset, .parquet or .jsonl")
    labels: Literal["annotator", "human"] = Field(
        "annotator", description="human: DATA holds labelled pairs, each of weight 1 (the baseline)"
    )
    epochs: float = Field(5, gt=0, description="passes over the pairs")
    batch_size: int = Field(16, ge=1, description="pairs a device and forward pass")
    gradient_accumulation: int = Field(4, ge=1, description="forward passes a step")
    learning_rate: float = Field(2e-5, gt=0, description="peak of AdamW's, before a cosine")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW")
    max_length: int = Field(1024, ge=2, description="tokens a text; longer pairs are left out")
    gradient_checkpointing: bool = Field(False, description="slower, with less memory")
    lora: bool = Field(False, description="train a low-rank adapter, merged at the end")
    lora_rank: int = Field(8, ge=1, description="r of LoRA")
    lora_alpha: int = Field(16, ge=1, description="alpha of LoRA")
    lora_dropout: float = Field(
        0.05, ge=0, lt=1, description="of LoRA in SFT; in alignment TRL turns all dropout off"
    )
    optimizer: Literal["adamw", "paged_adamw_32bit"] = Field(
        "adamw", description="paged: its states move to the CPU under pressure; needs bitsandbytes"
    )
    load_in_4bit: bool = Field(
        False, description="QLoRA: the frozen weights in 4 bits (NF4); needs bitsandbytes"
    )
    eval_data: Path | None = Field(
        None, description="file like DATA to evaluate on in training, weighted as DATA is"
    )
    eval_fraction: float = Field(
        0, ge=0, lt=1, description="or the share of DATA's prompts to keep for that"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations; an epoch by default"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="tracker to log to besides training.jsonl, under the name of --output"
    )
    push_to_hub: str | None = Field(
        None, description="Hub id owner/name to upload the result to; a new one is private"
    )
    annotator: str | None = Field(
        None,
        description="folder, Hub id or revision of the annotator that has to have written DATA; "
        "Parquet says which one did",
    )
    sharding: Literal["none", "fsdp2", "zero3"] = Field(
        "none", description="of the model over the GPUs; none: each holds it whole (DDP)"
    )
    dry_run: bool = Field(
        False,
        description="print steps, tokens, memory and time, and what it fits on; train nothing",
    )


class Sft(PolicyTraining):
    """Fine-tune the strong model on the chosen responses of the weighted dataset.

    The loss is on the response alone. The output is a plain model, with any LoRA adapter merged,
    and the start and reference of `cwpo align`.

    Example:
        cwpo sft --model models/smollm2 --data weighted.parquet --output runs/sft --lora
    """

    epochs: float = Field(3, gt=0, description="passes over the pairs")

    def cli_cmd(self) -> None:
        """Train."""
        from cwpo_trainer import sft

        sft.run(self)


class Align(PolicyTraining):
    """Align the strong model on preferences weighted by confidence (CW-DPO, CW-IPO, CW-rDPO).

    The reference is the model that it starts from, unless --reference names another: start from
    the output of `cwpo sft`.

    Example:
        cwpo align --model runs/sft --data weighted.parquet --loss dpo --output runs/cw-dpo --lora
    """

    loss: Literal["dpo", "ipo", "rdpo", "hinge", "cdpo", "simpo", "orpo"] = Field(
        "dpo", description="eq. 9, 10, 11, or another; simpo and orpo have no reference"
    )
    reference: str | None = Field(
        None, description="folder or Hub id of the reference; by default the model it starts from"
    )
    weight: Literal[
        "confidence", "none", "top", "margin", "normalised_margin", "power", "entropy", "rank"
    ] = Field(
        "confidence",
        description="of each pair, from its confidence; none is the unweighted loss, top that of "
        "the most confident pairs alone",
    )
    top_percent: float = Field(30, gt=0, le=100, description="of weight top: pairs to keep")
    exponent: float = Field(2, gt=0, description="of weight power")
    calibrated: bool = Field(False, description="weight by the column calibrated_confidence")
    normalise: bool = Field(
        False, description="divide the weights by their mean, which keeps the size of the steps"
    )
    learning_rate: float = Field(5e-6, gt=0, description="peak of AdamW's, before a cosine")
    beta: float = Field(0.5, gt=0, description="how dear it is to leave SFT; not of ipo")
    tau: float = Field(0.5, gt=0, description="of ipo: the margin aimed at is 1 / (2 tau)")
    ipo_length_normalised: bool = Field(
        True, description="log-ratios a token as in TRL, or else their sum as in eq. 10"
    )
    epsilon: float = Field(0.1, ge=0, lt=0.5, description="of rdpo, cdpo: share of flipped labels")
    precompute_reference: bool = Field(
        False, description="of dpo-like losses: run the reference once, before training, not in it"
    )
    gamma: float = Field(0.5, ge=0, description="of simpo: the margin aimed at, after beta")

    def cli_cmd(self) -> None:
        """Train."""
        from cwpo_trainer import align

        align.run(self)


class Online(ServiceCommand):
    """Align the strong model in rounds, on answers of its own that the service annotates.

    Each round samples answers with the policy as it is, has them annotated, and aligns the policy
    on them as `cwpo align` does. OUTPUT/rounds.jsonl tells how each went, with the drift of
    confidence from that on the annotator's held-out pairs: the paper shows that rounds fail where
    the annotator does not keep up with the policy.

    Example:
        cwpo online --model runs/sft --prompts prompts.jsonl --align align.yaml -o runs/online
    """

    config: Path | None = Field(None, description="YAML file of these settings; flags win over it")
    model: str = Field(description="folder or Hub id of the policy to start from")
    prompts: Path = Field(description=".jsonl, .jsonl.gz or .parquet with a column prompt")
    output: Path = Field(description="folder to create, with a folder for each round")
    align: Path | None = Field(
        None,
        description="YAML of `cwpo align` for every round; its model, data and output do not count",
    )
    rounds: int = Field(3, ge=1, description="of generating, annotating and aligning")
    reference: Literal["first", "round"] = Field(
        "first", description="of the loss: MODEL throughout, or what the round starts from"
    )
    prompts_per_round: int | None = Field(
        None, ge=1, description="drawn in turn from all, shuffled; all in every round by default"
    )
    responses: int = Field(
        2, ge=2, description="sampled for a prompt; of more than 2 the best and worst by score"
    )
    temperature: float = Field(0.9, gt=0, description="of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="of sampling")
    max_new_tokens: int = Field(256, ge=1, description="of an answer")
    batch_size: int = Field(16, ge=1, description="answers sampled at once")
    truncation: Truncation = Field(
        "error", description="of texts over the annotator's limit: refuse, or cut the prompt"
    )
    drift_limit: float = Field(
        0.1, gt=0, le=1, description="warn when confidence has moved by more on average"
    )
    seed: int = Field(0, description="of the prompts' order and of sampling")
    dtype: DType = Field("auto", description="of sampling; auto: as the model is stored")
    threads: int | None = Field(None, ge=1, description="of the CPU; all there are by default")
    resume: bool = Field(
        False, description="go on in this --output from where it was interrupted, or to more rounds"
    )

    def cli_cmd(self) -> None:
        """Do the rounds."""
        from cwpo_trainer import online

        online.run(self)


class EvaluateAnnotator(Command):
    """Measure an annotator's agreement with human labels, overall and by confidence.

    Example:
        cwpo evaluate annotator --annotator runs/annotator --data held_out.jsonl -o runs/accuracy
    """

    annotator: str = Field(description="folder or Hub id")
    data: str = Field(description="labelled pairs, as for train-annotator")
    output: Path = Field(description="folder to create")
    dtype: DType = Field("auto", description="of the arithmetic; auto: bfloat16 on a GPU")
    threads: int | None = Field(None, ge=1, description="of the CPU; all there are by default")

    def cli_cmd(self) -> None:
        """Measure."""
        from cwpo_trainer.evaluation import annotator

        annotator.run(self)


class EvaluatePolicy(Command):
    """Compare aligned policies with the model that they started from.

    On labelled pairs: how often the chosen response has the higher implicit reward. On their
    prompts: how often the policy's sampled answer scores above the reference's.

    Example:
        cwpo evaluate policy --reference runs/sft --policy runs/cw-dpo --policy runs/dpo
        --annotator runs/annotator --data held_out.jsonl --output runs/evaluation
    """

    reference: str = Field(description="folder of the SFT model")
    policy: list[str] = Field(min_length=1, description="folder of an aligned model; repeatable")
    annotator: str = Field(description="folder or Hub id of the judge")
    data: str = Field(description="labelled pairs, as for train-annotator")
    output: Path = Field(description="folder to create")
    prompts: int = Field(100, ge=1, description="to sample answers for, from the first on")
    max_new_tokens: int = Field(256, ge=1, description="of an answer")
    temperature: float = Field(0.7, ge=0, description="of sampling; 0 is greedy")
    batch_size: int = Field(8, ge=1, description="texts a forward pass")
    beta: float = Field(0.5, gt=0, description="of the implicit reward; as in align")
    seed: int = Field(0, description="of sampling, the same for every policy")
    dtype: DType = Field(
        "auto",
        description="of the models; auto: as they are stored, since a short alignment changes "
        "weights by less than bfloat16 resolves",
    )
    threads: int | None = Field(None, ge=1, description="of the CPU; all there are by default")

    def cli_cmd(self) -> None:
        """Measure."""
        from cwpo_trainer.evaluation import policy

        policy.run(self)


class Evaluate(Command):
    """Measure annotators and aligned policies.

    Example:
        cwpo evaluate annotator --annotator runs/annotator --data held_out.jsonl -o runs/accuracy
    """

    annotator: CliSubCommand[EvaluateAnnotator]
    policy: CliSubCommand[EvaluatePolicy]


class Report(Command):
    """Draw what the commands left under a run folder as one HTML page.

    Example:
        cwpo report runs/demo
    """

    run: CliPositionalArg[Path] = Field(description="folder that holds the commands' outputs")
    weighted: Path | None = Field(
        None, description="weighted dataset for the histogram; RUN/weighted.parquet by default"
    )

    def cli_cmd(self) -> None:
        """Write RUN/report.html and say where."""
        from cwpo_trainer import report

        print(report.write(self.run, self.weighted))
