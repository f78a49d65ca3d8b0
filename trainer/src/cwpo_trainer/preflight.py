"""What is checked before any model is loaded: that all that a run's settings need is there."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cwpo.errors import ConfigError
from cwpo_annotator.checkpoint import resolve, revision
from cwpo_trainer import runtime
from cwpo_trainer.losses import REFERENCE_FREE
from cwpo_trainer.weighted import annotator_of

if TYPE_CHECKING:
    from cwpo_trainer.commands import Align, PolicyTraining

_REVISION = re.compile(r"[0-9a-f]{12}")


def check(settings: PolicyTraining) -> None:
    """Raises: ConfigError for the first setting that cannot be had, with what to do.

    A dry run may be of another machine than this one.
    """
    _check_evaluation(settings)
    if settings.load_in_4bit and not settings.lora:
        raise ConfigError("--load-in-4bit: 4-bit weights cannot be trained; add --lora")
    if settings.load_in_4bit and settings.sharding != "none":
        raise ConfigError(
            "--load-in-4bit: each GPU holds the 4-bit weights whole; leave --sharding out"
        )
    if settings.annotator is not None:
        _check_annotator(settings, settings.annotator)
    if settings.dry_run:
        return
    runtime.expect_world_size(settings.world_size)
    _check_machine(settings)
    if settings.report_to != "none":
        _need(settings.report_to, f"--report-to {settings.report_to}")
    if settings.report_to == "wandb" and runtime.is_main():
        _check_wandb()
    if settings.push_to_hub is not None and runtime.is_main():
        _check_hub(settings.push_to_hub)


def check_loss(settings: Align) -> None:
    """Raises: ConfigError for a setting that the loss or the labels have no use for."""
    if settings.precompute_reference and settings.loss in REFERENCE_FREE:
        raise ConfigError(f"--precompute-reference: {settings.loss} has no reference")
    if settings.reference is not None:
        if settings.loss in REFERENCE_FREE:
            raise ConfigError(f"--reference: {settings.loss} has no reference")
        resolve(settings.reference)
    if settings.labels == "human" and (
        settings.calibrated or settings.weight not in ("confidence", "none")
    ):
        raise ConfigError("--labels human: each pair has the weight 1, and no annotator's")


def _check_evaluation(settings: PolicyTraining) -> None:
    if settings.eval_data is not None and settings.eval_fraction:
        raise ConfigError("--eval-data and --eval-fraction: give one of them")
    if settings.eval_steps and settings.eval_data is None and not settings.eval_fraction:
        raise ConfigError("--eval-steps: nothing to evaluate on; give --eval-data too")


def _check_machine(settings: PolicyTraining) -> None:
    if settings.load_in_4bit:
        _need("bitsandbytes", "--load-in-4bit")
    for flag, is_set, package in (
        (f"--optimizer {settings.optimizer}", settings.optimizer != "adamw", "bitsandbytes"),
        ("--sharding fsdp2", settings.sharding == "fsdp2", "torch"),
        ("--sharding zero3", settings.sharding == "zero3", "deepspeed"),
    ):
        if is_set:
            _need_cuda(flag)
            _need(package, flag)


def _need_cuda(flag: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"{flag}: needs a CUDA GPU, and torch sees none here")


def _need(package: str, flag: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{flag}: the package is missing; `pip install {package}`")


def _check_annotator(settings: PolicyTraining, wanted: str) -> None:
    if settings.labels == "human":
        raise ConfigError("--annotator: human labels come from none")
    written_by = annotator_of(settings.data)
    if written_by is None:
        raise ConfigError(
            f"--annotator: {settings.data} does not say which annotator wrote it; Parquet from "
            "`cwpo annotate` does"
        )
    expected = wanted if _REVISION.fullmatch(wanted) else revision(resolve(wanted))
    if written_by.revision != expected:
        raise ConfigError(
            f"{settings.data} was written by {written_by.name} at revision {written_by.revision}, "
            f"not by {wanted} at {expected}: annotate it anew, or name the right --annotator"
        )


def _check_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise ConfigError(
            f"--report-to wandb: W&B lets nobody in: {str(error).splitlines()[0]} With "
            "WANDB_MODE=offline the log stays here"
        ) from error


def _check_hub(repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push-to-hub: a Hub id looks like owner/name, not {repository!r}")
    try:
        HfApi().whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--push-to-hub: the Hub lets nobody in: {reason}; `hf auth login` first"
        ) from error
