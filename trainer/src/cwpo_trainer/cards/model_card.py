"""A README.md with the metadata that the Hub reads, from a template and what a run recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from cwpo_trainer.cards.origin import Origin
from cwpo_trainer.run.folder import README_NAME, RunRecord

Facts = Mapping[str, object]
"""The rows of a table, by their names; a row of None is left out."""

_REJECTED, _TIES, _TOO_LONG = "rejected", "ties", "pairs_too_long"


def write_model_card(folder: Path, template: str, metadata: ModelCardData, **values: Any) -> None:
    """Write README.md into the folder of a model; see `rendered`."""
    ModelCard(rendered(template, metadata, **values)).save(folder / README_NAME)


def rendered(template: str, metadata: ModelCardData | DatasetCardData, **values: Any) -> str:
    """A card as text.

    Args:
        template: name of a file in cards/templates.
        values: what the template reads besides the metadata.
    """
    environment = Environment(
        loader=PackageLoader("cwpo_trainer.cards"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = _table
    text = environment.get_template(template).render(metadata=metadata, **values)
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def origin_fields(origin: Origin, relation: str) -> dict[str, Any]:
    """Fields of the metadata that come from the base model.

    Args:
        relation: of the model to its base model, by the Hub's word: "finetune" or "adapter".
    """
    of_base = {"base_model": origin.hub_id, "base_model_relation": relation}
    return {**origin.licence, **(of_base if origin.hub_id else {})}


def left_out(results: Mapping[str, Any]) -> str:
    """How many rows a run left out for each reason: "2 too_long, 1 tie", or "none"."""
    reasons = {
        **results.get(_REJECTED, {}),
        "too_long": results.get(_TOO_LONG),
        "tie": results.get(_TIES),
    }
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "none"


def optimisation(settings: Mapping[str, Any]) -> Facts:
    """The settings of training that all commands have."""
    length = f"{settings['max_steps']:,} steps" if settings["max_steps"] else None
    lora = settings["lora"]
    return {
        "length": length or f"{settings['epochs']:g} epochs",
        "peak learning rate": f"{settings['learning_rate']:g}",
        "warm-up": f"at most {settings['warmup_steps']:,} steps",
        "weight decay": f"{settings['weight_decay']:g}",
        "largest gradient norm": f"{settings['max_grad_norm']:g}",
        "LoRA": f"rank {settings['lora_rank']}, alpha {settings['lora_alpha']}" if lora else None,
        "most tokens of a text": f"{settings['max_length']:,}",
        "number format": settings["dtype"],
        "seed": settings["seed"],
    }


def versions(record: RunRecord) -> str:
    """The versions of libraries in one line."""
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


def _table(facts: Facts) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
