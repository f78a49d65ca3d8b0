"""Recipes of our own: uses of the confidence side by side, and a world whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cwpo_trainer.reproduction import published
from cwpo_trainer.reproduction.method import (
    Parts,
    Place,
    aligned,
    annotator,
    material,
    sft,
    split,
    weighted,
)
from cwpo_trainer.reproduction.policy_recipes import Pairing, Setting
from cwpo_trainer.reproduction.published import Line, Table
from cwpo_trainer.reproduction.readings import (
    Reading,
    accuracy,
    accuracy_gain,
    gold_reward_accuracy,
    reward_gap,
    unscored,
)
from cwpo_trainer.reproduction.recipe import Readings, Recipe, Row, rows_of
from cwpo_trainer.reproduction.scale import Scale
from cwpo_trainer.reproduction.step import Output, Step

_PAIRING = Pairing.of(published.OPT_1_3B)
_DATA = "Harmless"
# What `cwpo align` does with the confidence of a pair.
_UNUSED, _CERTIFIED = "not at all", "filter: certified"
_USES: Mapping[str, Mapping[str, Any]] = {
    _UNUSED: {"weight": "none"},
    "weight": {"weight": "confidence"},
    "soft label": {"confidence_as": "soft_label"},
    "epsilon of rDPO": {"confidence_as": "robust"},
    "filter: top 30%": {"weight": "top", "top_percent": 30},
    _CERTIFIED: {"weight": "certified"},
}
_USE = "Use of the confidence"
# What is read of a policy, by line: GRA, the answers that cannot be scored, and what is gained over
# not using the confidence.
_MEASURES: Mapping[str, Callable[[Step, Output], Reading]] = {
    "GRA": gold_reward_accuracy,
    "answers without a score": unscored,
    "GRA over not at all": accuracy_gain,
    "reward over not at all": reward_gap,
}
_COMPARED = {"GRA over not at all", "reward over not at all"}
# The share of wrong labels that a certificate allows: annotators of few labels get no stricter one.
_MAX_ERROR = {"small": 0.3, "paper": 0.2}
_CERTIFIED_ON = 0.2
_NOISES = {"10% noise": 0.1, "30% noise": 0.3}
_SHARES = {"10% labelled": 0.1, "30% labelled": 0.3, "50% labelled": 0.5}


def contest(scale: Scale) -> list[Row]:
    """Every use of the confidence, on the same labels, from one SFT model, for as many steps."""

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            shared = material(scale, _DATA, seed)
            pool = shared.parts.unlabelled
            # The certificate's labels are neither the annotator's nor the policies'.
            apart = split(pool, seed, labelled=1, held_out=_CERTIFIED_ON, label="apart")
            parts = Parts(
                shared.parts.labelled,
                apart / "labelled.jsonl",
                shared.parts.held_out,
                shared.parts.everything,
            )
            setting = Setting(scale, _PAIRING, replace(shared, parts=parts), seed)
            made = annotator(scale, parts.labelled, seed, weak=_PAIRING.weak)
            labels = weighted(made, parts.unlabelled)
            start = sft(scale, _PAIRING.strong, labels, seed, shared.max_length)

            def used(use: str) -> Output:
                pairs = labels
                if use == _CERTIFIED:
                    pairs = _certified(scale, made, apart / "held_out.jsonl", parts.unlabelled)
                label = use.rsplit(": ", maxsplit=1)[-1].replace(" ", "-").replace("%", "")
                common = (seed, shared.max_length)
                return aligned(scale, start, pairs, *common, label=label, **_USES[use])

            # Apart: labels may be too few for a certificate, which then fails its own column only.
            is_certified = column == _CERTIFIED
            together = [column] if is_certified else [use for use in _USES if use != _CERTIFIED]
            evaluation = setting.evaluation(
                [used(use) for use in together], start, baseline=used(_UNUSED)
            )
            return (_MEASURES[line[1]](evaluation, used(column)),)

        is_baseline = column == _UNUSED and line[1] in _COMPARED
        return "is what it is compared with" if is_baseline else read

    lines = {(_USE, name): (None,) * len(_USES) for name in _MEASURES}
    return rows_of(Table((*_USES,), lines), at)


def _certified(scale: Scale, made: Output, labels: Place, pairs: Place) -> Output:
    """The pairs with the column certified, by a certificate that these labels gave."""
    max_error = _MAX_ERROR[scale.name]
    settings = {"annotator": made, "data": labels, "max_error": max_error, "certify": True}
    certificate = Step("evaluate annotator", "certificate", settings)
    return weighted(made, pairs, after=certificate, max_error=max_error)


def controlled_world(scale: Scale) -> list[Row]:
    """A gold reward model is the people: labels are drawn from its probabilities, at some noise.

    It is trained on the human labels of pairs that nothing else uses, and also judges the answers.
    So both how often labels are right and how good answers are is known. Columns: how often the
    annotator's labels are the gold ones, and the GRA of policies on drawn labels, on the
    annotator's without weights, and with them.
    """

    def at(line: Line, column: str) -> Readings:
        noise, share = _NOISES[line[0]], _SHARES[line[1]]

        def read(seed: int) -> tuple[Reading, ...]:
            shared = material(scale, _DATA, seed)
            gold = weighted(shared.judge, shared.parts.everything)
            drawn, truth = (_drawn(gold, level, seed) for level in (noise, 0))
            # The same rows in the same order, so the same split.
            people, true = (split(labels, seed, labelled=share) for labels in (drawn, truth))
            parts = Parts(
                people / "labelled.jsonl",
                people / "unlabelled.jsonl",
                shared.parts.held_out,
                drawn,
            )
            setting = Setting(scale, _PAIRING, replace(shared, parts=parts), seed)
            if column == "labels right":
                made = annotator(scale, parts.labelled, seed, weak=_PAIRING.weak)
                return (accuracy(scale, made, true / "unlabelled.jsonl"),)
            if column == "people":
                return (setting.accuracy(*setting.human()),)
            (weighted_, start), (unweighted, _) = setting.cw(), setting.cw(weight="none")
            policy = weighted_ if column == "CW-DPO" else unweighted
            return (setting.accuracy(policy, start, [unweighted, weighted_]),)

        return read

    columns = ("labels right", "people", "unweighted", "CW-DPO")
    lines = {(noise, share): (None,) * len(columns) for noise in _NOISES for share in _SHARES}
    return rows_of(Table(columns, lines), at)


def _drawn(gold: Output, noise: float, seed: int) -> Output:
    settings = {"data": gold, "noise": noise, "seed": seed}
    return Step("data draw", "drawn", settings, ".jsonl").made


OUR_RECIPES = (
    Recipe(
        "contest",
        "Uses of the confidence",
        "gold reward accuracy, %",
        contest,
        drawing="bars",
        is_the_papers=False,
    ),
    Recipe(
        "controlled-world",
        "People that are a reward model, by label noise and share of labels",
        "agreement with the truth, and gold reward accuracy, %",
        controlled_world,
        drawing="lines",
        is_the_papers=False,
    ),
)
