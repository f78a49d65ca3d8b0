"""The card of a policy that `cwpo sft`, `cwpo align` or `cwpo online` trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cwpo_annotator.checkpoint import base_name, is_adapter
from cwpo_trainer.cards.model_card import (
    Facts,
    left_out,
    optimisation,
    origin_fields,
    versions,
    write_model_card,
)
from cwpo_trainer.cards.origin import origin
from cwpo_trainer.constants import HasConstants
from cwpo_trainer.losses import EPSILON, LOSSES
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import ADAPTER_FOLDER, LOG_NAME, RunFolder, RunRecord, read_lines
from cwpo_trainer.run.resumption import started_with
from cwpo_trainer.soft_labels import SOFT_LABELS
from cwpo_trainer.weights import WEIGHTS

# How the names of losses are written that are not in capitals.
_WRITTEN = {"cdpo": "cDPO", "rdpo": "rDPO", "hinge": "hinge", "simpo": "SimPO"}


def write_policy_cards(output: RunFolder) -> None:
    """Write README.md into the folder of a run, and beside the adapter in it, if there is one."""
    if not process.is_main():
        return
    record = output.record()
    for folder in (output.path, output.path / ADAPTER_FOLDER):
        if folder.is_dir():
            _write(folder, record, output.path)


def _write(folder: Path, record: RunRecord, run: Path) -> None:
    settings, results = record.settings, record.results
    start = origin(str(settings["model"]))
    is_lora = is_adapter(folder)
    base = origin(base_name(folder)) if is_lora else start
    repository = settings["push_to_hub"] if folder == run else None
    name = method(settings)
    metadata = ModelCardData(
        **origin_fields(base, "adapter" if is_lora else "finetune"),
        library_name="peft" if is_lora else "transformers",
        pipeline_tag="text-generation",
        tags=["cwpo", "trl", name.lower(), *(["lora"] if settings["lora"] else [])],
    )
    write_model_card(
        folder,
        "policy.md",
        metadata,
        title=str(repository).partition("/")[2] if repository else f"A policy trained by {name}",
        method=name,
        kind=record.kind,
        start=start,
        is_adapter=is_lora,
        has_template=(folder / "chat_template.jinja").is_file(),
        place=repository or ".",
        loss={} if record.kind == "sft" else _loss(settings),
        data=_data(settings, results, started_with(run)),
        training=_training(settings, started_with(run)),
        results=_results(results, run),
        versions=versions(record),
    )


def method(settings: Mapping[str, Any]) -> str:
    """What the method is called: SFT, or the loss, with CW before it if confidence weights it."""
    if "loss" not in settings:
        return "SFT"
    loss, weight = settings["loss"], WEIGHTS[settings["weight"]]
    name = _WRITTEN.get(loss, loss.upper())
    is_soft = settings.get("confidence_as", "weight") != "weight"
    is_weighted = weight.reads_confidence and not weight.selects
    if settings["labels"] == "annotator" and (is_soft or is_weighted):
        return f"CW-{name}"
    return str(name)


def _loss(settings: Mapping[str, Any]) -> Facts:
    loss, weight = LOSSES[settings["loss"]], WEIGHTS[settings["weight"]]
    soft = SOFT_LABELS.get(settings.get("confidence_as", "weight"))
    without = (EPSILON.flag,) if soft else ()
    of_weight = f"`{settings['weight']}`: {weight.meaning}{_constants(weight, settings)}"
    if settings["calibrated"]:
        of_weight += "; C is the calibrated confidence"
    if settings["normalise"]:
        of_weight += "; divided by the mean"
    if settings.get("weight_by") == "prompt":
        of_weight += "; divided by the number of pairs of the prompt"
    reference = None
    if loss.reads_reference:
        named = settings["reference"]
        reference = "the model to start from" if named is None else origin(named).described
    return {
        "loss": f"`{settings['loss']}` ({loss.source}){_constants(loss, settings, without)}",
        "formula": f"\\\\({loss.formula}\\\\)",
        "confidence C": soft.meaning if soft else None,
        "weight of a pair": "1" if settings["labels"] == "human" or soft else of_weight,
        "reference model": reference,
    }


def _constants(
    entry: HasConstants, settings: Mapping[str, Any], without: tuple[str, ...] = ()
) -> str:
    named = [each.flag for each in entry.constants if each.flag not in without]
    return "".join(f", {name} {settings[name]}" for name in named)


def _data(
    settings: Mapping[str, Any], results: Mapping[str, Any], started: Mapping[str, Any]
) -> Facts:
    annotator = results.get("annotator")
    by = "an annotator that the data does not name"
    if annotator:
        by = f"the annotator `{annotator['name']}`, revision `{annotator['revision']}`"
    fingerprint = started.get("sha256 of data")
    held_out, prompts = results.get("eval_pairs"), results.get("prompts")
    hashed = f"SHA-256 of the {'prompts' if prompts else 'file'}"
    return {
        "pairs": f"{results['pairs']:,}",
        "answers": f"of the policy itself, to {prompts:,} prompts" if prompts else None,
        "labelled by": "people" if settings["labels"] == "human" else by,
        hashed: f"`{fingerprint}`" if fingerprint else None,
        "rows left out": left_out(results),
        "pairs of the evaluation": f"{held_out:,}" if held_out else None,
    }


def _training(settings: Mapping[str, Any], started: Mapping[str, Any]) -> Facts:
    batch, accumulated = settings["batch_size"], settings["gradient_accumulation"]
    processes = started.get("number of processes", 1)
    sharding = settings["sharding"]
    return {
        **optimisation(settings),
        "pairs of a step": f"{batch} x {accumulated} x {processes} "
        "(a device x accumulated x processes)",
        "optimiser": settings["optimizer"],
        "frozen weights": "4 bits (NF4)" if settings["load_in_4bit"] else None,
        "sharding": None if sharding == "none" else sharding,
    }


def _results(results: Mapping[str, Any], run: Path) -> Facts:
    last: Mapping[str, Any] = next(
        (line for line in reversed(read_lines(run / LOG_NAME)) if "loss" in line), {}
    )
    lost = results.get("update_lost_in_merging")
    return {
        "steps": last.get("step"),
        "loss of the last step": last.get("loss"),
        "evaluation loss": results.get("eval_loss"),
        "mean weight": results.get("mean_weight"),
        "largest weight": results.get("max_weight"),
        "update lost in merging the adapter": None if lost is None else f"{lost:.1%}",
    }
