"""What is checked before any model is loaded: that all that a run's settings need is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from cwpo.errors import ConfigError, first_line
from cwpo_annotator.checkpoint import resolve, revisions
from cwpo_trainer import hub
from cwpo_trainer.data.weighted import read_annotator
from cwpo_trainer.policy import reference_cache
from cwpo_trainer.run import process
from cwpo_trainer.settings.mixins import Evaluation, OptimizerName, Publication, ShardingName
from cwpo_trainer.settings.policy_training import (
    Labels,
    PairLoss,
    PolicyData,
    PolicyStep,
    PolicyTraining,
    Weighting,
)
from cwpo_trainer.weights import WEIGHTS

_REVISION = re.compile(r"[0-9a-f]{12}")
# Modules and packages of trackers that are not called alike; of kubeflow there is none.
_OF_TRACKERS: dict[str, dict[str, str]] = {
    "azure_ml": {"azureml": "azureml-core"},
    "dagshub": {"dagshub": "dagshub", "mlflow": "mlflow"},
    "flyte": {"flytekit": "flytekit"},
    "kubeflow": {},
}


def check(step: PolicyStep) -> None:
    """All checks of what SFT and alignment share.

    A dry run may be of another machine than this one.
    Raises: ConfigError for the first setting that cannot be had, with what to do.
    """
    _check_evaluation(step)
    _check_adapter(step)
    _check_4bit(step)
    _check_optimizer(step)
    _check_labels(step)
    if step.dry_run:
        return
    process.expect_world_size(step.world_size)
    _check_launch(step.sharding)
    _check_machine(step.load_in_4bit, step.optimizer, step.sharding)
    _check_attention(step)
    _check_publication(step)


def check_loss(loss: PairLoss) -> None:
    """Raises: ConfigError for a setting of a reference where the loss has none, or a wrong one."""
    for flag, is_set in (
        ("--precompute-reference", loss.precompute_reference),
        ("--reference-cache", loss.reference_cache is not None),
        ("--reference", loss.reference is not None),
    ):
        if is_set and not loss.reads_reference:
            raise ConfigError(f"{flag}: {loss.loss} has no reference")
    if loss.reference is not None:
        resolve(loss.reference)
    if loss.reference_cache is not None:
        reference_cache.check(loss.reference_cache)


def check_reference(loss: PairLoss, training: PolicyTraining) -> None:
    """Raises: ConfigError where what would read the pairs in advance is not on any GPU yet."""
    flag = "--precompute-reference" if loss.reference_cache is None else "--reference-cache"
    is_policy = training.lora and loss.reference is None
    if loss.precomputes_reference and is_policy and training.sharding == "fsdp2":
        raise ConfigError(
            f"{flag}: with --lora the reference is the policy without its adapter, and FSDP2 "
            "shards it only as training begins; leave the flag out"
        )


def check_weighting(weighting: Weighting, labels: Labels) -> None:
    """Raises: ConfigError for settings of weights where people labelled the pairs.

    The default weight says no more than that no other was asked for.
    """
    if labels != "human":
        return
    is_default = weighting.weight == Weighting.model_fields["weight"].default
    weight = WEIGHTS[weighting.weight]
    from_confidence = (weight.reads_confidence or weight.reads_certified) and not is_default
    for flag, is_set in (
        ("--weight", from_confidence),
        ("--weight-by", "weight_by" in weighting.model_fields_set),
        ("--calibrated", weighting.calibrated),
        ("--normalise", weighting.normalise),
    ):
        if is_set:
            raise ConfigError(f"--labels human: each pair has the weight 1; leave {flag} out")


def _check_evaluation(evaluation: Evaluation) -> None:
    if evaluation.eval_data is not None and evaluation.eval_fraction:
        raise ConfigError("--eval-data and --eval-fraction: give one of them")
    for flag, is_set in (
        ("--eval-steps", evaluation.eval_steps),
        ("--keep-best", evaluation.keep_best),
        ("--patience", evaluation.patience),
    ):
        if is_set and not evaluation.evaluates:
            raise ConfigError(f"{flag}: nothing to evaluate on; give --eval-data too")


def _check_adapter(training: PolicyTraining) -> None:
    if training.adapter_only and not training.lora:
        raise ConfigError("--adapter-only: all weights are trained; add --lora")


def _check_4bit(training: PolicyTraining) -> None:
    if not training.load_in_4bit:
        return
    if not training.lora:
        raise ConfigError("--load-in-4bit: 4-bit weights cannot be trained; add --lora")
    if training.sharding != "none":
        raise ConfigError(
            "--load-in-4bit: each GPU holds the 4-bit weights whole; leave --sharding out"
        )


def _check_optimizer(training: PolicyTraining) -> None:
    if training.optimizer != "adamw" and training.sharding == "fsdp2":
        raise ConfigError(
            f"--optimizer {training.optimizer}: bitsandbytes cannot update the sharded weights of "
            "FSDP2; leave the flag out, or use --sharding none"
        )


def _check_launch(sharding: ShardingName) -> None:
    if sharding != "none" and not process.is_launched():
        raise ConfigError(
            f"--sharding {sharding}: several processes share the model; start them with "
            "`torchrun --nproc-per-node ... -m cwpo_trainer.align` (or .sft, .online)"
        )


def _check_labels(data: PolicyData) -> None:
    if data.annotator is None:
        return
    if data.labels == "human":
        raise ConfigError("--annotator: no annotator wrote human labels; leave the flag out")
    _check_annotator(data.data, data.annotator)


def of_gpus(optimizer: OptimizerName, sharding: ShardingName) -> dict[str, str]:
    """The flags that need a CUDA GPU, and the package that does what each says."""
    packages = {"fsdp2": "torch", "zero3": "deepspeed"}
    needed = {} if optimizer == "adamw" else {f"--optimizer {optimizer}": "bitsandbytes"}
    if sharding != "none":
        needed[f"--sharding {sharding}"] = packages[sharding]
    return needed


def _check_machine(in_4bit: bool, optimizer: OptimizerName, sharding: ShardingName) -> None:
    if in_4bit:
        _need("bitsandbytes", "--load-in-4bit")
    for flag, package in of_gpus(optimizer, sharding).items():
        _need_cuda(flag)
        _need(package, flag)


def _check_attention(training: PolicyTraining) -> None:
    if training.attn_implementation != "flash_attention_2":
        return
    flag = "--attn-implementation flash_attention_2"
    _need_cuda(flag)
    _need("flash_attn", flag)
    if not process.use_bfloat16(training.dtype):
        raise ConfigError(f"{flag}: computes in bfloat16 only; use --dtype bfloat16")


def _check_publication(publication: Publication) -> None:
    if publication.report_to != ["none"]:
        _check_trackers(publication.report_to)
    if not process.is_main():
        return
    if "wandb" in publication.report_to:
        _check_wandb()
    if publication.push_to_hub is not None:
        hub.check(publication.push_to_hub, "--push-to-hub")


def _check_trackers(trackers: Sequence[str]) -> None:
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for tracker in trackers:
        flag = f"--report-to {tracker}"
        if tracker not in known:
            raise ConfigError(f"{flag}: transformers knows {', '.join(known)}")
        for module, package in _OF_TRACKERS.get(tracker, {tracker: tracker}).items():
            _need(module, flag, package)
    if "comet_ml" in trackers and not integration_utils.is_comet_available():  # type: ignore[no-untyped-call]
        raise ConfigError("--report-to comet_ml: comet has no API key; set COMET_API_KEY")


def _need_cuda(flag: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"{flag}: needs a CUDA GPU, and torch sees none here")


def _need(module: str, flag: str, package: str | None = None) -> None:
    if find_spec(module) is None:
        raise ConfigError(f"{flag}: the package is missing; `pip install {package or module}`")


def _check_annotator(data: Path, wanted: str) -> None:
    written_by = read_annotator(data)
    if written_by is None:
        raise ConfigError(
            f"--annotator: {data} does not say which annotator wrote it; Parquet from "
            "`cwpo annotate` does"
        )
    expected = (wanted,) if _REVISION.fullmatch(wanted) else revisions(resolve(wanted))
    if written_by.revision not in expected:
        raise ConfigError(
            f"{data} was written by {written_by.name} at revision {written_by.revision}, "
            f"not by {wanted} at {expected[0]}: annotate it anew, or name the right --annotator"
        )


def _check_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise ConfigError(
            f"--report-to wandb: the login at W&B failed: {first_line(error)} With "
            "WANDB_MODE=offline the log stays here"
        ) from error
