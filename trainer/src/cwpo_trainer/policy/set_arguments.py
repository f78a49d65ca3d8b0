"""`--set`: arguments of TRL's trainers that no flag of ours has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, get_type_hints

import torch
from pydantic import JsonValue, TypeAdapter, ValidationError
from transformers import TrainingArguments, get_scheduler
from trl.trainer.sft_config import SFTConfig

from cwpo.errors import ConfigError, first_line, mistake_in
from cwpo_trainer.losses import EPSILON, GAMMA
from cwpo_trainer.settings.policy_training import PolicyStep
from cwpo_trainer.settings.unused_flags import flag

# Settings that say the same, by the names of TRL.
_SETTINGS = {
    "output_dir": "output",
    "resume_from_checkpoint": "resume",
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "schedule",
    "logging_strategy": "logging_steps",
    "model_init_kwargs": "attn_implementation",
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), "keep_best"
    ),
    "activation_checkpointing": "gradient_checkpointing",
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), "dtype"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "sharding"),
    "eval_strategy": "eval_steps",
    "do_eval": "eval_data",
    "save_strategy": "save_steps",
    "hub_model_id": "push_to_hub",
    "loss_type": "loss",
    "precompute_ref_log_probs": "precompute_reference",
    "weight_column": "weight",
    "epsilon_column": "confidence_as",
    "label_smoothing": EPSILON.flag,
    "simpo_gamma": GAMMA.flag,
}

_REFUSED = {
    name: reason
    for reason, names in {
        "DATA is tokenised before TRL's trainer reads it": (
            *("chat_template_path", "dataset_text_field", "dataset_kwargs", "dataset_num_proc"),
            *("eos_token", "pad_token", "truncation_mode", "length_column_name"),
            *("packing", "packing_strategy", "eval_packing", "padding_free"),
            *("completion_only_loss", "assistant_only_loss", "remove_unused_columns"),
            "label_names",
        ),
        "the loss here does not read it": (
            *("label_smoothing_factor", "average_tokens_across_devices"),
            *("use_liger_kernel", "liger_kernel_config", "loss_weights", "ld_alpha"),
            *("f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau"),
            "loss_type",
        ),
        "the model is loaded before TRL's trainer gets it": (*("trust_remote_code", "use_cache"),),
        "policy and reference are compared without dropout": ("disable_dropout",),
        "no optimiser of --optimizer reads it": ("optim_args", "optim_target_modules"),
        "an evaluation computes nothing but the loss": (
            *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "do_predict"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        ),
        "a run that is resumed would not end as one that was not stopped": (
            *("save_only_model", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
            *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            *("enable_jit_checkpoint", "save_on_each_node"),
        ),
        "processes and devices are those of torchrun and of this machine": (
            *("local_rank", "use_cpu", "accelerator_config", "do_train"),
        ),
        "steps differ in their number of rows": ("ddp_static_graph",),
        "the log is training.jsonl, and a loss of NaN ends the run": (
            *("disable_tqdm", "logging_nan_inf_filter", "include_num_input_tokens_seen"),
        ),
        "only the finished model is uploaded, to --push-to-hub": (
            *("hub_token", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"),
        ),
    }.items()
    for name in names
}
_REFUSED_BY_ALIGN = {
    "neftune_noise_alpha": "policy and reference are compared without noise",
    "train_sampling_strategy": "the order of the pairs is random",
}
# What is meant for batches of padded texts.
_OF_PADDED = {
    *("neftune_noise_alpha", "pad_to_multiple_of"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
}


def set_arguments(step: PolicyStep, config: type[TrainingArguments]) -> dict[str, JsonValue]:
    """What --set says, each value by the type of its argument.

    Args:
        config: the class of the trainer's arguments.
    Raises: ConfigError for an argument that the config does not have, that a flag covers, or that
        the run would ignore or break by; and for a value of another type.
    """
    arguments = {}
    kinds = get_type_hints(config) if step.set else {}
    for given, value in step.set.items():
        name = given.replace("-", "_")
        problem = _problem(name, step, config, kinds)
        if problem is not None:
            raise ConfigError(f"--set {given}: {problem}")
        arguments[name] = _of_type(kinds[name], given, value)
    return arguments


def with_set(
    config: type[TrainingArguments], ours: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Any:
    """The trainer's arguments: ours, and over them those of --set.

    Raises: ConfigError where --set has values that do not go together, or not with this machine or
        with --schedule.
    """
    try:
        made = config(**{**ours, **arguments})
    except (ValueError, TypeError, ImportError) as error:
        if not arguments:
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"--set {', '.join(arguments)}: {reason}") from error
    _try_schedule(made)
    return made


def _try_schedule(made: TrainingArguments) -> None:
    """On one weight, since the trainer makes the schedule only after all else."""
    name = getattr(made.lr_scheduler_type, "value", made.lr_scheduler_type)
    try:
        get_scheduler(
            name,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
            num_warmup_steps=1,
            num_training_steps=1000,
            scheduler_specific_kwargs=made.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"--schedule {name}: {first_line(error)}; --set lr_scheduler_kwargs='{{...}}' has its "
            "constants"
        ) from error


def _problem(
    name: str, step: PolicyStep, config: type[TrainingArguments], known: Iterable[str]
) -> str | None:
    """Why an argument is refused; None if it is not."""
    settings = type(step).model_fields
    own = _SETTINGS.get(name, name)
    if own in settings:
        return f"use {flag(own)}"
    if name in _REFUSED:
        return _REFUSED[name]
    if name not in known:
        closest = ", ".join(get_close_matches(name, {*known, *settings}, cutoff=0.5))
        return f"{config.__name__} has no such argument; the closest: {closest or 'none'}"
    if name in _REFUSED_BY_ALIGN and config is not SFTConfig:
        return _REFUSED_BY_ALIGN[name]
    if name in _OF_PADDED and step.share_prompts:
        return "it is for padded texts; add --no-share-prompts"
    return None


def _of_type(kind: Any, given: str, value: JsonValue) -> JsonValue:
    """The value as the type of its argument; a text is read as JSON, or else as it is.

    Raises: ConfigError for a value that is none of the type.
    """
    values: TypeAdapter[JsonValue] = TypeAdapter(kind)
    try:
        with suppress(ValidationError, json.JSONDecodeError):
            read = json.loads(value) if isinstance(value, str) else value
            return values.validate_python(read, strict=True)
        return values.validate_python(value, strict=not isinstance(value, str))
    except ValidationError as error:
        raise ConfigError(f"--set {given}: {mistake_in(error)}, not {value!r}") from error
