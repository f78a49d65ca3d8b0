"""Recipes that measure annotators alone: Tables 6, 12 and 13, Figures 7 and 8, and of our own."""

from __future__ import annotations

from typing import Any

from cwpo_trainer.reproduction import published
from cwpo_trainer.reproduction.method import (
    BOTH,
    Place,
    annotation_parts,
    annotator,
    mixed,
    split,
    weighted,
)
from cwpo_trainer.reproduction.published import Line, Table
from cwpo_trainer.reproduction.readings import (
    Reading,
    accuracy,
    accuracy_of_surest,
    confidence,
    disagreement,
    seconds,
)
from cwpo_trainer.reproduction.recipe import Readings, Recipe, Row, rows_of
from cwpo_trainer.reproduction.scale import Scale
from cwpo_trainer.reproduction.step import Output, Step

# As Tables 6, 12 and 13 name what the others call otherwise.
_DATA_SETS = {"Harmlessness": "Harmless", "Helpfulness": "Helpful", "Both": "HH-RLHF"}
_WEAK = {"Qwen-0.5B": "Qwen2.5-0.5B"}
_OBJECTIVES = {"DPO": "dpo", "SFT+DPO": "sft+dpo", "BT": "bt", "PairRM": "pairrm"}
_COVERAGES = {"10%": 0.1, "30%": 0.3, "50%": 0.5, "75%": 0.75, "100%": 1.0}
_FLIPPED = {"0%": 0.0, "10%": 0.1, "20%": 0.2, "30%": 0.3, "40%": 0.4}
_POISONED = {"0%": 0.0, "5%": 0.05, "10%": 0.1, "15%": 0.15, "20%": 0.2}
_MIXTURES = {"50% + 50%": 0.5, "80% + 20%": 0.8, "20% + 80%": 0.2}
# Of Figure 7's five domains.
_DOMAINS = ("Harmless", "Helpful", "TL;DR", "UFB", "askacademia")
# Of the surest labels, those that an attack flips; of all harmless pairs, those in D_U (App. J.8).
_ATTACKED, _IN_UNLABELLED = 0.5, 0.22


def _named(name: str) -> str:
    return _DATA_SETS.get(name, name)


def unavailable(scale: Scale, *names: str) -> str | None:
    """Why one of these data sets is not there at this scale; None if all are."""
    parts = [part for name in names for part in (BOTH if name == "HH-RLHF" else (name,))]
    found = (scale.data_set(part) for part in parts)
    return next((data.missing for data in found if data.pairs is None), None)


def objectives(scale: Scale) -> list[Row]:
    """Table 6, and PairRM of Table 26 beside it; its last line is the time that training took."""
    paper = published.TABLE_6
    columns = (*paper.columns, "PairRM")
    lines = {line: (*figures, None) for line, figures in paper.lines.items()}
    of_time = {("Time cost (s)", "OPT-125M, Harmless"): (*published.TABLE_6_TIME, None)}

    def trained(weak: str, data: str, column: str, seed: int) -> tuple[Output, Place]:
        parts = annotation_parts(scale, _named(data), seed)
        max_length = scale.data_set(_named(data)).max_length
        made = annotator(
            scale,
            parts.labelled,
            seed,
            weak=_WEAK.get(weak, weak),
            objective=_OBJECTIVES[column],
            max_length=max_length,
            # All of one model: an implicit reward needs a language model.
            **_same_model(scale, weak),
        )
        return made, parts.held_out

    def at(line: Line, column: str) -> Readings | str:
        why = unavailable(scale, _named(line[1])) or _one_model(scale, line[0])
        return why or (lambda seed: (accuracy(scale, *trained(*line, column, seed)),))

    def time(line: Line, column: str) -> Readings | str:
        why = unavailable(scale, "Harmless")
        return why or (lambda seed: (seconds(trained("OPT-125M", "Harmless", column, seed)[0]),))

    return [
        *rows_of(Table(columns, lines), at),
        *rows_of(Table(columns, of_time), time),
    ]


def _same_model(scale: Scale, weak: str) -> dict[str, str]:
    return {"model": scale.implicit[_WEAK.get(weak, weak)]}


def _one_model(scale: Scale, weak: str) -> str | None:
    """Why another model of the paper is not run: at the small scale it is the first again."""
    if scale.name == "small" and weak != "OPT-125M":
        return "one annotator at this scale"
    return None


def sizes(scale: Scale) -> list[Row]:
    """Table 12: size of the annotator, by its first layers where the scale has one model."""

    def at(line: Line, column: str) -> Readings | str:
        name = _named(line[1])
        layers: dict[str, Any] = {"layers": scale.layers[column]} if scale.layers else {}
        weak = "Qwen2.5-0.5B" if scale.layers else f"Qwen2.5-{column}"

        def read(seed: int) -> tuple[Reading, ...]:
            parts = annotation_parts(scale, name, seed)
            made = annotator(
                scale,
                parts.labelled,
                seed,
                weak=weak,
                max_length=scale.data_set(name).max_length,
                **layers,
            )
            return (accuracy(scale, made, parts.held_out),)

        return unavailable(scale, name) or read

    return rows_of(published.TABLE_12, at)


def labelled_shares(scale: Scale) -> list[Row]:
    """Table 13: share of the pairs that is labelled."""

    def at(line: Line, column: str) -> Readings | str:
        name, share = _named(line[1]), int(column.rstrip("%")) / 100

        def read(seed: int) -> tuple[Reading, ...]:
            parts = annotation_parts(scale, name, seed, share)
            made = annotator(scale, parts.labelled, seed, weak="OPT-125M")
            return (accuracy(scale, made, parts.held_out),)

        return unavailable(scale, name) or read

    return rows_of(published.TABLE_13, at)


def surest(scale: Scale) -> list[Row]:
    """What Figure 2 rests on: labels of high confidence are more often right."""

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            parts = annotation_parts(scale, line[1], seed)
            made = annotator(scale, parts.labelled, seed, weak=line[0])
            return (accuracy_of_surest(scale, made, parts.held_out, _COVERAGES[column]),)

        return unavailable(scale, line[1]) or read

    lines = {("OPT-125M", name): (None,) * len(_COVERAGES) for name in (*BOTH, "HH-RLHF")}
    return rows_of(Table((*_COVERAGES,), lines), at)


def confidences(scale: Scale) -> list[Row]:
    """Figure 7: how confident annotators are, each of one domain."""
    columns = {f"{10 * tenth}%": tenth for tenth in range(11)}

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            parts = annotation_parts(scale, line[1], seed)
            max_length = scale.data_set(line[1]).max_length
            made = annotator(scale, parts.labelled, seed, weak=line[0], max_length=max_length)
            return (confidence(scale, made, parts.held_out, columns[column]),)

        return unavailable(scale, line[1]) or read

    lines = {("OPT-125M", name): (None,) * len(columns) for name in _DOMAINS}
    return rows_of(Table((*columns,), lines), at)


def flipped_labels(scale: Scale) -> list[Row]:
    """Labels flipped at random."""

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            parts = annotation_parts(scale, line[1], seed)
            share, labels = _FLIPPED[column], parts.labelled
            if share:
                flags = {"data": labels, "share": share, "seed": seed}
                labels = Step("data poison", "flipped", flags, ".jsonl").made
            made = annotator(scale, labels, seed, weak=line[0])
            return (accuracy(scale, made, parts.held_out),)

        return unavailable(scale, line[1]) or read

    lines = {("OPT-125M", name): (None,) * len(_FLIPPED) for name in BOTH}
    return rows_of(Table((*_FLIPPED,), lines), at)


def imbalance(scale: Scale) -> list[Row]:
    """The annotator's side of Table 24: accuracy on each source by the mixture of the labels."""

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            made, parts = mixture_annotator(scale, _MIXTURES[line[1]], seed)
            return (accuracy(scale, made, parts[column]),)

        return unavailable(scale, *BOTH) or read

    lines = {("Harmless + Helpful", name): (None, None) for name in _MIXTURES}
    return rows_of(Table(BOTH, lines), at)


def mixture_annotator(
    scale: Scale, harmless: float, seed: int, objective: str = "bt"
) -> tuple[Output, dict[str, Place]]:
    """An annotator of a mixture, and held-out pairs of each source (Table 24).

    All mixtures have as many labels: as the source that is rarest in any of them allows.

    Args:
        harmless: share of harmless pairs among the labels.
    """
    parts = {name: annotation_parts(scale, name, seed) for name in BOTH}
    labels = {name: each.labelled for name, each in parts.items()}
    mixture = mixed(labels, (harmless, round(1 - harmless, 6)), seed, pairs=_fewest(scale))
    made = annotator(scale, mixture, seed, weak="OPT-125M", objective=objective)
    return made, {name: each.held_out for name, each in parts.items()}


def _fewest(scale: Scale) -> int:
    """Labels of each mixture: four fifths of them are of one source, which has 30 % labelled."""
    return 750 if scale.name == "small" else 15_000


def disagreements(scale: Scale) -> list[Row]:
    """Figure 8: disagreement with people on D_U by the share of poisoned labels."""

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            made, unlabelled = poisoned_annotator(scale, _POISONED[column], seed)
            return (disagreement(scale, made, unlabelled),)

        return unavailable(scale, *BOTH) or read

    lines = {("OPT-125M", "Disagreement on D_U"): (None,) * len(_POISONED)}
    return rows_of(Table((*_POISONED,), lines), at)


def poisoned_annotator(
    scale: Scale, share: float, seed: int, objective: str = "bt"
) -> tuple[Output, Place]:
    """An annotator of helpful labels with harmful ones among them, and the D_U of App. J.8.

    The harmful labels are those of which a reward model for harmlessness is surest, flipped.
    """
    helpful, harmless = (annotation_parts(scale, name, seed) for name in BOTH)
    labels: Place = helpful.labelled
    if share:
        judge: Place | None = scale.data_set("Harmless").judge
        known, rest = harmless.labelled, harmless.labelled
        if judge is None:
            # Half of the harmless labels train the reward model, half are poison.
            halves = split(harmless.labelled, seed, labelled=0.5, label="halves")
            known, rest = halves / "labelled.jsonl", halves / "unlabelled.jsonl"
            judge = annotator(scale, known, seed, weak="OPT-125M", label="harmlessness")
        scored = weighted(judge, rest)
        flags = {"share": _ATTACKED, "surest": True, "only_flipped": True, "seed": seed}
        poison = Step("data poison", "poison", {"data": scored, **flags}, ".jsonl").made
        sources = {"helpful": helpful.labelled, "poison": poison}
        labels = mixed(sources, (round(1 - share, 6), share), seed)
    made = annotator(scale, labels, seed, weak="OPT-125M", objective=objective)
    unlabelled = mixed(
        {"helpful": helpful.unlabelled, "harmless": harmless.unlabelled},
        (1 - _IN_UNLABELLED, _IN_UNLABELLED),
        seed,
    )
    return made, unlabelled


ANNOTATOR_RECIPES = (
    Recipe(
        "table-6",
        "Training objective of the annotator",
        "agreement with human labels, %",
        objectives,
        averages=True,
    ),
    Recipe(
        "table-12", "Size of the annotator", "agreement with human labels, %", sizes, averages=True
    ),
    Recipe(
        "table-13",
        "Share of labels of the annotator",
        "agreement with human labels, %",
        labelled_shares,
        averages=True,
    ),
    Recipe(
        "figure-7",
        "Confidence of annotators by domain",
        "confidence at each tenth of the pairs",
        confidences,
        drawing="lines",
    ),
    Recipe(
        "figure-8",
        "Annotators of poisoned labels",
        "disagreement with human labels on D_U, %",
        disagreements,
        drawing="lines",
    ),
    Recipe(
        "surest-labels",
        "Labels of the most confident pairs",
        "agreement with human labels, %",
        surest,
        drawing="lines",
        is_the_papers=False,
    ),
    Recipe(
        "flipped-labels",
        "Annotators of labels that are flipped at random",
        "agreement with human labels, %",
        flipped_labels,
        drawing="lines",
        is_the_papers=False,
    ),
    Recipe(
        "imbalance",
        "Annotators of labels out of balance, by source",
        "agreement with human labels, %",
        imbalance,
        drawing="bars",
        is_the_papers=False,
    ),
)
