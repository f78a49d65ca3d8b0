"""The steps of CW-PO and of what it is compared with, as the recipes put them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cwpo_trainer.reproduction.scale import DataSet, Scale
from cwpo_trainer.reproduction.step import Output, SettingsFile, SharedFolder, Step

# The paper's share of labels.
LABELLED = 0.3
# Of all pairs, to measure annotators on; of what small policies are trained and judged with.
_MEASURED, _TESTED, _JUDGES = 0.3, 0.15, 0.4
BOTH = ("Harmless", "Helpful")
_ALL = 1_000_000_000
# Policies of one start and the same pairs read them once with the reference model.
_REFERENCES = SharedFolder("references")

Place = Output | str
Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """The pairs of one data set and seed. All have human labels; unlabelled ones are not read.

    labelled, unlabelled: the paper's D_L and D_U. held_out: to measure on, None where the data set
    has a test set. everything: D_L and D_U together.
    """

    labelled: Output
    unlabelled: Output
    held_out: Place
    everything: Output


@dataclass(frozen=True)
class Material:
    """What the rows of a data set share: pairs, judge, and how long texts are.

    asked: what an LLM judge is asked of its answers.
    """

    parts: Parts
    judge: Place
    max_length: int
    asked: str


def pairs_of(scale: Scale, name: str, seed: int) -> Place:
    """The pairs of a data set; those of HH-RLHF are one half harmless and one half helpful."""
    if name != "HH-RLHF":
        return scale.data_set(name).source
    return mixed({each: scale.data_set(each).source for each in BOTH}, (0.5, 0.5), seed)


def mixed(
    sources: Mapping[str, Place], shares: tuple[float, ...], seed: int, pairs: int | None = None
) -> Output:
    """Pairs of several sources, by their names, in these shares; as many as there are for None."""
    label = "mix-" + "-".join(name.lower() for name in sources)
    by_place = dict(zip(sources.values(), shares, strict=True))
    settings = {"sources": by_place, "pairs": pairs, "seed": seed}
    return Step("data mix", label, settings, ".jsonl").made


def split(
    pairs: Place, seed: int, *, labelled: float, held_out: float = 0, label: str = "parts"
) -> Output:
    """A folder with labelled.jsonl, unlabelled.jsonl and held_out.jsonl."""
    fractions = {"labelled_fraction": labelled, "held_out_fraction": held_out}
    return Step("data split", label, {"data": pairs, **fractions, "seed": seed}).made


def annotation_parts(scale: Scale, name: str, seed: int, share: float = LABELLED) -> Parts:
    """Parts to measure annotators with.

    Args:
        share: of all pairs, to train on. The pairs that are held out are the same for all shares.
    """
    pairs = pairs_of(scale, name, seed)
    folder = split(pairs, seed, labelled=round(share / (1 - _MEASURED), 6), held_out=_MEASURED)
    return _parts(folder, folder / "held_out.jsonl", pairs, seed, held_out_fraction=_MEASURED)


def material(scale: Scale, name: str, seed: int, share: float = LABELLED) -> Material:
    """Parts to train policies with, and what judges them.

    Where the scale has no test set and no gold reward model, a part of the pairs is held out, and
    another one trains the judge, which has nothing in common with the annotator's labels.
    """
    data = scale.data_set(name)
    pairs = pairs_of(scale, name, seed)
    if data.judge is not None:
        folder = split(pairs, seed, labelled=share)
        test = _test_pairs(scale, data, seed)
        parts = _parts(folder, test, pairs, seed)
        return Material(parts, data.judge, data.max_length, data.asked)
    first = split(pairs, seed, labelled=_JUDGES, held_out=_TESTED, label="judge-parts")
    pool = first / "unlabelled.jsonl"
    folder = split(pool, seed, labelled=share)
    judge = annotator(
        scale,
        first / "labelled.jsonl",
        seed,
        weak="OPT-125M",
        label="judge",
        max_length=data.max_length,
    )
    parts = _parts(folder, first / "held_out.jsonl", pool, seed)
    return Material(parts, judge, data.max_length, data.asked)


def annotator(
    scale: Scale,
    labelled: Place,
    seed: int,
    *,
    weak: str,
    objective: str = "bt",
    max_length: int = 512,
    label: str | None = None,
    model: str | None = None,
    **flags: Any,
) -> Output:
    """Step (i): an annotator of these labels, trained on all of them.

    Args:
        weak: the paper's name of the model; model: another one in its place.
    """
    models = scale.implicit if objective in ("dpo", "sft+dpo") else scale.weak
    model = model or models[weak]
    is_language_model = model == scale.implicit[weak]
    gpus = scale.gpus.get(model, 1)
    shared = {"sharding": "fsdp2", "gradient_checkpointing": True} if gpus > 1 else {}
    settings = {
        "model": model,
        "data": labelled,
        "objective": objective,
        **scale.annotator,
        **(scale.language_annotator if is_language_model else {}),
        "max_length": max_length,
        "held_out_fraction": 0,
        "seed": seed,
        **shared,
        **flags,
    }
    name = label or f"annotator-{objective.replace('+', '-')}"
    return Step("train-annotator", name, settings, gpus=gpus).made


def weighted(
    judge: Place, pairs: Place, *, after: Step | None = None, max_error: float | None = None
) -> Output:
    """Step (ii): the pairs with the annotator's labels and confidences."""
    settings: dict[str, Any] = {"input": pairs, "truncation": "prompt_left"}
    if max_error is not None:
        settings["max_error"] = max_error
    # By requests, so that no job needs workers and a store.
    settings["job_above"] = _ALL
    return Step("annotate", "weighted", settings, ".parquet", serves=judge, after=after).made


def sft(
    scale: Scale, strong: str, pairs: Place, seed: int, max_length: int, *, human: bool = False
) -> Output:
    """Step (iii), first half: the policy on the chosen responses, by annotator or by people."""
    settings = {"model": scale.strong[strong], "data": pairs, **scale.sft}
    return Step("sft", "sft", {**settings, **_labels(human, max_length, seed)}).made


def aligned(
    scale: Scale,
    start: Output,
    pairs: Place,
    seed: int,
    max_length: int,
    *,
    label: str,
    human: bool = False,
    **flags: Any,
) -> Output:
    """Step (iii), second half: the policy on the preferences."""
    settings = {"model": start, "data": pairs, **scale.align, "reference_cache": _REFERENCES}
    if flags.get("loss") == "ipo":
        settings["tau"] = settings.pop("beta")
    return Step("align", label, {**settings, **_labels(human, max_length, seed), **flags}).made


def online(
    scale: Scale,
    start: Output,
    prompts: Place,
    judge: Place,
    seed: int,
    max_length: int,
    *,
    label: str,
    **flags: Any,
) -> Output:
    """The policy on its own answers, which the annotator labels (App. J.5)."""
    alignment = {**scale.align, "max_length": max_length, "seed": seed, **flags}
    settings = {
        "model": start,
        "prompts": prompts,
        "update": "immediate",
        "align": SettingsFile(alignment),
        **scale.online,
        "seed": seed,
    }
    return Step("online", label, settings, serves=judge).made


def _test_pairs(scale: Scale, data: DataSet, seed: int) -> Place:
    """Those of HH-RLHF, which has none of its own, are one half of each of its two."""
    if data.test is not None:
        return data.test
    tests: dict[str, Place] = {f"{each}-test": scale.data_set(each).test or "" for each in BOTH}
    return mixed(tests, (0.5, 0.5), seed)


def _parts(
    folder: Output, held_out: Place, pairs: Place, seed: int, *, held_out_fraction: float = 0
) -> Parts:
    everything = split(pairs, seed, labelled=1, held_out=held_out_fraction, label="everything")
    return Parts(
        folder / "labelled.jsonl",
        folder / "unlabelled.jsonl",
        held_out,
        everything / "labelled.jsonl",
    )


def _labels(human: bool, max_length: int, seed: int) -> dict[str, Any]:
    labels = {"labels": "human"} if human else {}
    return {**labels, "max_length": max_length, "seed": seed}
