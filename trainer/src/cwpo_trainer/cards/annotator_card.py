"""The card of an annotator that `cwpo train-annotator` trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cwpo_annotator.checkpoint import IMPLICIT, Card, Objective
from cwpo_trainer.cards.model_card import (
    Facts,
    left_out,
    optimisation,
    origin_fields,
    versions,
    write_model_card,
)
from cwpo_trainer.cards.origin import origin
from cwpo_trainer.data.labelled import hub_dataset
from cwpo_trainer.intervals import wilson
from cwpo_trainer.run.folder import RunFolder

_IMPLICIT = (
    "each response by itself, after its prompt, under two language models: its score is beta times "
    "the difference of its log-probabilities here and in the folder `reference`"
)
_READING: dict[Objective, str] = {
    "bt": "each response by itself, after its prompt; its score is read at the last token",
    "pairrm": "both responses in one text, in both orders; a response alone has no score",
    "dpo": _IMPLICIT,
    "sft+dpo": _IMPLICIT,
}
_CONSTANTS: dict[Objective, tuple[str, ...]] = {
    "bt": ("margin", "label_smoothing"),
    "pairrm": ("label_smoothing",),
    "dpo": ("beta", "label_smoothing"),
    "sft+dpo": ("beta", "sft_epochs", "label_smoothing"),
}


def write_annotator_card(output: RunFolder, card: Card) -> None:
    """Write README.md into the folder of an annotator.

    Args:
        card: its annotator.json.
    """
    record = output.record()
    settings, results = record.settings, record.results
    objective: Objective = card.objective or "bt"
    start = origin(str(settings["model"]))
    metadata = ModelCardData(
        **origin_fields(start, "finetune"),
        datasets=hub_dataset(str(settings["data"])),
        library_name="transformers",
        pipeline_tag=None if objective in IMPLICIT else "text-classification",
        tags=["cwpo", "annotator", "reward-model", "preferences", objective],
    )
    write_model_card(
        output.path,
        "annotator.md",
        metadata,
        start=start,
        method={
            "objective": f"`{objective}`"
            + "".join(f", {name} {settings[name]}" for name in _CONSTANTS[objective]),
            "what it reads": _READING[objective],
            "architecture": _architecture(output.path),
            "layers kept": settings["layers"],
        },
        data=_data(card, results),
        quality=_quality(card),
        bins=_bins(results),
        limits={
            "most tokens of prompt and response": f"{card.encoding.max_length:,}",
            "in training": "longer prompts lost their oldest tokens, and pairs with a response "
            "that is too long were left out",
            "in use": "a text that is too long is an error, unless `--truncation prompt_left` "
            "cuts the prompt",
        },
        temperature=card.temperature,
        training={**optimisation(settings), "pairs of a step": settings["batch_size"]},
        versions=versions(record),
    )


def _architecture(folder: Path) -> str:
    named = json.loads((folder / "config.json").read_text()).get("architectures") or ["unknown"]
    return ", ".join(f"`{name}`" for name in named)


def _data(card: Card, results: Mapping[str, Any]) -> Facts:
    held_out = card.held_out.pairs if card.held_out else 0
    return {
        "fingerprint of the labelled pairs": f"`{card.data_fingerprint}`",
        "pairs of training": f"{results['pairs']:,}",
        "pairs of validation and calibration": f"{results['validation_pairs']:,}",
        "pairs held out": f"{held_out:,}",
        "rows left out": left_out(results),
        "prompts truncated": f"{results['prompts_truncated']:,}",
    }


def _quality(card: Card) -> Facts:
    measured = card.held_out
    if measured is None:
        return {}
    lowest, highest = wilson(measured.accuracy, measured.pairs)
    return {
        "accuracy": f"{measured.accuracy:.1%} (95 % interval {lowest:.1%} to {highest:.1%})",
        "mean confidence": f"{measured.mean_confidence:.3f}",
        "calibration error": measured.ece,
        "calibration error of calibrated confidence": measured.calibrated_ece,
    }


def _bins(results: Mapping[str, Any]) -> Facts:
    """Accuracy by tenths of confidence, the most confident first."""
    bins = results.get("held_out", {}).get("bins", [])
    return {
        f"{each['lowest']:.3f} to {each['highest']:.3f}": f"{each['accuracy']:.1%} of "
        f"{each['pairs']:,}"
        for each in reversed(bins)
    }
