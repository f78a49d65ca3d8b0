"""The strong model: loading it, training it with TRL, and saving it as a plain model."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINING_ARGS_NAME

from cwpo.errors import CwpoError, DatasetError
from cwpo_annotator.checkpoint import CheckpointError, resolve
from cwpo_trainer import runtime, sharding
from cwpo_trainer.interruption import EXIT_CODE, SaveOnTerm, checkpoint_to_resume
from cwpo_trainer.record import CHECKPOINTS_NAME, LOG_NAME, Output
from cwpo_trainer.training_log import TrainingLog

if TYPE_CHECKING:
    from cwpo_trainer.commands import PolicyTraining

WARMUP_SHARE = 0.1
_PART = 1024
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged_adamw_32bit": "paged_adamw_32bit"}

T = TypeVar("T")


def load(
    folder: Path, *, dtype: torch.dtype | str = torch.float32, quantisation: Any = None
) -> Any:
    """A causal language model, from safetensors and without code of its own.

    Raises: CheckpointError for a folder that holds none.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantisation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no causal language model: {_line(error)}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding with a token of its own or else with EOS.

    Raises: CheckpointError where there is none, or it has no EOS to end a response with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no tokenizer: {_line(error)}") from error
    if tokenizer.eos_token is None:
        raise CheckpointError(f"{folder}: the tokenizer has no EOS to end a response with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_for_training(settings: PolicyTraining, model: str | None = None) -> Any:
    """A model, by default the start one.

    Frozen bfloat16 weights under LoRA where it computes so, else float32.
    """
    frozen = settings.lora and runtime.use_bfloat16(settings.dtype)
    dtype = torch.bfloat16 if frozen else torch.float32
    quantisation = None
    if settings.load_in_4bit:
        quantisation = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    loaded = load(resolve(model or settings.model), dtype=dtype, quantisation=quantisation)
    _keep_weights_differentiable(loaded)
    return loaded


def _keep_weights_differentiable(model: Any) -> None:
    """Keep 4-bit layers on a CPU from a layout for inference alone.

    bitsandbytes takes it up in the first evaluation, and what is trained after it gets no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def lora_config(settings: PolicyTraining) -> LoraConfig | None:
    """LoRA on all linear layers but the head; None without --lora."""
    if not settings.lora:
        return None
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def training_arguments(settings: PolicyTraining, folder: Path, rows: int) -> dict[str, Any]:
    """What SFTConfig and DPOConfig share, for a dataset of `rows` rows."""
    steps = settings.max_steps or total_steps(settings, rows)
    return dict(
        **sharding.arguments(settings),
        output_dir=str(folder / CHECKPOINTS_NAME),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        optim=_OPTIMIZERS[settings.optimizer],
        warmup_steps=min(settings.warmup_steps, int(WARMUP_SHARE * steps)),
        weight_decay=settings.weight_decay,
        bf16=runtime.use_bfloat16(settings.dtype),
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=settings.seed,
        max_length=None,
        logging_steps=1,
        # With it a loss of NaN would be logged as the mean of the losses before.
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        # The one before stays until the next is whole.
        save_total_limit=2,
        eval_strategy=_eval_strategy(settings),
        eval_steps=settings.eval_steps,
        report_to=settings.report_to,
        run_name=settings.output.name,
        disable_tqdm=True,
    )


def _eval_strategy(settings: PolicyTraining) -> str:
    if settings.eval_data is None and not settings.eval_fraction:
        return "no"
    return "steps" if settings.eval_steps else "epoch"


def processes(settings: PolicyTraining) -> int:
    """Those that take part, or that are meant to where a run is only planned."""
    return settings.world_size or runtime.world_size()


def total_steps(settings: PolicyTraining, rows: int) -> int:
    """Optimiser steps over all epochs."""
    pairs_a_step = settings.batch_size * settings.gradient_accumulation * processes(settings)
    return math.ceil(math.ceil(rows / pairs_a_step) * settings.epochs)


def dataset_of(
    items: Sequence[T],
    rows: Callable[[Sequence[T]], list[dict[str, Any]]],
    max_length: int,
    output: Output,
    part: str = "",
) -> Dataset:
    """The rows that `rows` makes of the items, a part at a time, so that tokens stay compact.

    `rows` leaves out what is longer than max_length; that is said, and counted in the results
    under names that start with `part`.
    Raises: DatasetError when nothing is left.
    """
    starts = range(0, len(items), _PART)
    made = (rows(items[start : start + _PART]) for start in starts)
    parts = [Dataset.from_list(part) for part in made if part]
    used = sum(map(len, parts))
    output.results |= {f"{part}pairs": used, f"{part}pairs_too_long": len(items) - used}
    if not parts:
        raise DatasetError(f"all {len(items):,} pairs are longer than --max-length {max_length:,}")
    if used < len(items) and runtime.is_main():
        print(
            f"{len(items) - used:,} of {len(items):,} pairs are longer than --max-length "
            f"{max_length:,} tokens and left out",
            file=sys.stderr,
        )
    return concatenate_datasets(parts)


def train(trainer: Any, settings: PolicyTraining, output: Output, title: str) -> None:
    """Run a TRL trainer from its start or a checkpoint, with log and progress on the first rank.

    Exits: EXIT_CODE after a checkpoint, where SIGTERM came.
    """
    checkpoint = checkpoint_to_resume(settings, output)
    _keep_adapters_in_float32(trainer.model)
    interruption = SaveOnTerm()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(interruption)
    resumed = None if checkpoint is None else str(checkpoint)
    if runtime.is_main():
        after = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        with TrainingLog(output.folder / LOG_NAME, title, after=after) as log:
            trainer.add_callback(_Steps(log))
            trainer.train(resume_from_checkpoint=resumed)
    else:
        trainer.train(resume_from_checkpoint=resumed)
    if runtime.is_main():
        _finish_tracking(settings, output, stopped=interruption.stopped)
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    if evaluations:
        output.results |= {"eval_loss": evaluations[-1]["eval_loss"]}
    if interruption.stopped:
        _part(trainer)
        if runtime.is_main():
            step = trainer.state.global_step
            print(f"stopped by SIGTERM after step {step}: go on with --resume", file=sys.stderr)
        raise SystemExit(EXIT_CODE)


def _keep_adapters_in_float32(model: Any) -> None:
    """Undo TRL's cast of the adapters of a 4-bit model, which loses steps of a small rate.

    At a rate of 5e-6, bfloat16 rounds a step away wherever a weight has grown past 0.002.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def _finish_tracking(settings: PolicyTraining, output: Output, *, stopped: bool) -> None:
    boards = output.folder / CHECKPOINTS_NAME / "runs"
    if boards.is_dir() and not stopped:
        boards.rename(output.folder / "tensorboard")
    if settings.report_to == "wandb":
        import wandb

        # A next training in this process, as of online rounds, is a run of its own.
        wandb.finish()


def save(trainer: Any, settings: PolicyTraining, folder: Path) -> None:
    """Write the trained model as a plain one; a LoRA adapter is merged into its start model.

    The merge is in float32 on the start model as it was stored, so that small changes survive, and
    the result has the start model's own dtype.
    """
    if not settings.lora:
        trainer.save_model(str(folder))
        _part(trainer)
        # A pickle, and of nothing that run.json does not say.
        if runtime.is_main():
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        return
    adapter = folder / "adapter"
    trainer.save_model(str(adapter))
    _part(trainer)
    if not runtime.is_main():
        return
    # Else the start model would be sharded as well, over processes that have left.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    start = resolve(settings.model)
    merged = PeftModel.from_pretrained(load(start), adapter).merge_and_unload()
    stored = AutoConfig.from_pretrained(start, trust_remote_code=False).dtype or torch.float32
    merged.to(stored).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    shutil.rmtree(adapter)


def push(settings: PolicyTraining) -> None:
    """Upload the finished output folder to the Hub, where that was asked for.

    Raises: CwpoError when the Hub does not take it; the folder stays.
    """
    if settings.push_to_hub is None or not runtime.is_main():
        return
    hub = HfApi()
    try:
        hub.create_repo(settings.push_to_hub, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=settings.push_to_hub,
            folder_path=settings.output,
            commit_message=f"Upload {settings.output.name}",
        )
    except (HfHubHTTPError, OSError) as error:
        raise CwpoError(
            f"{settings.output} is complete, but the Hub did not take it: {_line(error)}; upload "
            f"it with `hf upload {settings.push_to_hub} {settings.output}`"
        ) from error


_never_freed: list[Any] = []


def _part(trainer: Any) -> None:
    """Let the processes go their own ways, none before all are through.

    What the first one does alone from here on may take longer than the others can wait.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if runtime.world_size() > 1:
        # Freed with the last model that refers to it, a gloo group would wait for its thread, and
        # that for the interpreter's lock, which is held then. `launch.leave` ends both.
        _never_freed.append(trainer)


class _Steps(TrainerCallback):
    """Leads what TRL logs into our log, the learning rate as `lr`."""

    def __init__(self, log: TrainingLog) -> None:
        self._log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log.start(state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values: dict[str, float] = dict(kwargs["logs"])
        if "loss" in values:
            lr = values.pop("learning_rate")
            self._log.step(step=state.global_step, lr=lr, **values)
        elif "eval_loss" in values:
            self._log.evaluation(step=state.global_step, **values)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
