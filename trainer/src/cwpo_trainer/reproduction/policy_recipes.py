"""Recipes of aligned policies: Tables 1 to 5, 10, 11, 16, 17, 20 to 26 and Figures 2 to 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cwpo_trainer.reproduction import published
from cwpo_trainer.reproduction.annotator_recipes import (
    mixture_annotator,
    poisoned_annotator,
    unavailable,
)
from cwpo_trainer.reproduction.method import (
    BOTH,
    Material,
    Place,
    aligned,
    annotator,
    material,
    mixed,
    online,
    sft,
    split,
    weighted,
)
from cwpo_trainer.reproduction.published import Line, Table
from cwpo_trainer.reproduction.readings import (
    Reading,
    gold_reward_accuracy,
    policy_evaluation,
    reward_gap,
    win_rate,
)
from cwpo_trainer.reproduction.recipe import Readings, Recipe, Row, rows_of
from cwpo_trainer.reproduction.scale import Scale
from cwpo_trainer.reproduction.step import Output, Step

_GRA = "gold reward accuracy, %"
_LOSSES = {"DPO": "dpo", "IPO": "ipo", "rDPO": "rdpo"}
# Of Table 5 the paper's formulas are missing but for the first: these are candidates for the rest.
_CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "C": {"weight": "confidence"},
    "margin": {"weight": "margin"},
    "C²": {"weight": "power", "exponent": 2},
    "1 - entropy": {"weight": "entropy"},
    "rank": {"weight": "rank"},
}
_SHARES = (10, 20, 30, 40, 50)
_SPLITS = (10, 20, 30, 50, 70, 90)
_TOPS = (10, 20, 30, 40, 50, 75, 100)
_MIXTURES = {"50% + 50%": 0.5, "80% + 20%": 0.8, "20% + 80%": 0.2}
_NO_LLM = "win rates need --llm-judge and --llm-judge-model"


@dataclass(frozen=True)
class Pairing:
    """A weak and a strong model, by the paper's names."""

    weak: str
    strong: str

    @classmethod
    def of(cls, name: str) -> Pairing:
        """From such as "OPT-125M → OPT-13B"."""
        weak, _, strong = name.partition(" → ")
        return cls(weak, strong)


@dataclass(frozen=True)
class Setting:
    """What the policies of one line of a table have in common, with one seed."""

    scale: Scale
    pairing: Pairing
    material: Material
    seed: int

    def labelled_by(self, objective: str) -> Output:
        """D_U with the labels of an annotator that was trained so."""
        made = annotator(
            self.scale,
            self.material.parts.labelled,
            self.seed,
            weak=self.pairing.weak,
            objective=objective,
            max_length=self.material.max_length,
        )
        return weighted(made, self.material.parts.unlabelled)

    def policy(
        self, pairs: Place, label: str, *, human: bool = False, **flags: Any
    ) -> tuple[Output, Output]:
        """The aligned policy, and the SFT model of the same labels that it started from."""
        common = (self.seed, self.material.max_length)
        start = sft(self.scale, self.pairing.strong, pairs, *common, human=human)
        made = aligned(self.scale, start, pairs, *common, label=label, human=human, **flags)
        return made, start

    def evaluation(self, policies: Sequence[Output], start: Output, **more: Any) -> Step:
        """Of policies that started from one SFT model, against it."""
        judge, prompts = self.material.judge, self.material.parts.held_out
        return policy_evaluation(self.scale, policies, start, judge, prompts, **more)

    def accuracy(
        self, policy: Output, start: Output, beside: Sequence[Output] = (), **more: Any
    ) -> Reading:
        """GRA of the policy against its SFT model.

        Args:
            beside: policies that the same evaluation measures; alone the policy for none.
        """
        return gold_reward_accuracy(self.evaluation(beside or [policy], start, **more), policy)

    def win_rate(self, policy: Output, start: Output, beside: Sequence[Output] = ()) -> Reading:
        """How often an LLM prefers its answers to the chosen responses."""
        llm = {**self.scale.llm_judge, "llm_judge_prompt": self.material.asked}
        return win_rate(self.evaluation(beside or [policy], start, **llm), policy)

    def human(self, **flags: Any) -> tuple[Output, Output]:
        """Human labels on D_U."""
        return self.policy(
            self.material.parts.unlabelled, "human", human=True, **flags, weight="none"
        )

    def ws(self, **flags: Any) -> tuple[Output, Output]:
        """WS-DPO of Tao and Li: labels by an implicit reward, no weights."""
        return self.policy(self.labelled_by("sft+dpo"), "ws", **flags, weight="none")

    def cw(self, **flags: Any) -> tuple[Output, Output]:
        """CW-PO, or what differs from it in the flags alone."""
        return self.policy(self.labelled_by("bt"), "cw", **flags)


Trained = Callable[[Setting], tuple[Output, Output]]
Measure = Callable[[Setting, Output, Output, Sequence[Output]], Reading]
_THREE: Mapping[str, Trained] = {
    "Human": Setting.human,
    "WS-DPO": Setting.ws,
    "CW-DPO": Setting.cw,
}


def _stand_in(scale: Scale, name: str, others: set[str]) -> str:
    """The data set that a line is run on: the small scale has but the harmless part of HH-RLHF."""
    if scale.name == "small" and name == "HH-RLHF" and "Harmless" not in others:
        return "Harmless"
    return name


def _missing(scale: Scale, pairing: Pairing, name: str) -> str | None:
    """Why policies of these models and data are not run at this scale; None if they are."""
    if pairing.strong not in scale.strong:
        return f"no {pairing.strong} at this scale"
    why = unavailable(scale, name)
    parts = BOTH if name == "HH-RLHF" else (name,)
    if why is None and not all(scale.data_set(part).for_policies for part in parts):
        return f"the texts of {name} are too long for policies of this scale"
    return why


def run_on(
    scale: Scale,
    pairing: Pairing,
    name: str,
    trained: Trained,
    share: float = 0.3,
    measured: Measure = Setting.accuracy,
    beside: Sequence[Trained] = (),
) -> Readings | str:
    """How a policy that is trained so is measured, or why it is not run.

    Args:
        share: of the pairs that are labelled.
        measured: from the policy, its SFT model and the policies that are measured with it, itself
            among them, to what is read; GRA by default.
        beside: how all policies of the line are trained, this one among them. Those that start from
            the same SFT model are measured together.
    """

    def read(seed: int) -> tuple[Reading, ...]:
        setting = Setting(scale, pairing, material(scale, name, seed, share), seed)
        policy, start = trained(setting)
        all_of_line = [each(setting) for each in beside]
        together = [made for made, its in all_of_line if its.step.name == start.step.name]
        return (measured(setting, policy, start, together),)

    return _missing(scale, pairing, name) or read


def _with_blocks(
    table: Table,
    scale: Scale,
    trained: Callable[[str], Trained],
    measured: Callable[[str], Measure] = lambda _: Setting.accuracy,
) -> list[Row]:
    """Rows of a table whose lines are models and data sets, and whose columns are trainings."""
    names = {line[1] for line in table.lines}

    def at(line: Line, column: str) -> Readings | str:
        name = _stand_in(scale, line[1], names)
        pairing = Pairing.of(line[0])
        return run_on(
            scale,
            pairing,
            name,
            trained(column),
            measured=measured(column),
            beside=[trained(each) for each in table.columns],
        )

    return rows_of(table, at)


def _losses(column: str) -> Trained:
    loss, _, labels = column.partition(": ")
    method = {"Human": Setting.human, "WS-DPO": Setting.ws}.get(labels, Setting.cw)
    return lambda setting: method(setting, loss=_LOSSES[loss])


def table_1(scale: Scale) -> list[Row]:
    """Human labels, WS-DPO and CW-PO with three losses."""
    return _with_blocks(published.TABLE_1, scale, _losses)


def table_20(scale: Scale) -> list[Row]:
    """The same, with the standard deviation over thirds of the test set."""
    return _with_blocks(published.TABLE_20, scale, _losses)


def table_17(scale: Scale) -> list[Row]:
    """Win rates by an LLM against the chosen responses."""
    if not scale.llm_judge:
        return rows_of(published.TABLE_17, lambda line, column: _NO_LLM)
    return _with_blocks(published.TABLE_17, scale, _losses, lambda _: Setting.win_rate)


def table_2(scale: Scale) -> list[Row]:
    """Size of the policy."""

    def at(line: Line, column: str) -> Readings | str:
        name = _stand_in(scale, line[0], set())
        return run_on(scale, Pairing.of(line[1]), name, _THREE[column])

    return rows_of(published.TABLE_2, at)


def table_3(scale: Scale) -> list[Row]:
    """All human labels against 30 % of them."""

    def trained(column: str) -> Trained:
        if column == "CW-DPO":
            return Setting.cw
        return lambda setting: setting.policy(
            setting.material.parts.everything, "human", human=True, weight="none"
        )

    return _with_blocks(published.TABLE_3, scale, trained)


def _top(column: str) -> Trained:
    if column in ("Human", "CW-DPO"):
        return _THREE[column]
    percent = int(column.removeprefix("Top ").rstrip("%"))
    if percent == 100:
        return lambda setting: setting.cw(weight="none")
    return lambda setting: setting.cw(weight="top", top_percent=percent)


def table_4(scale: Scale) -> list[Row]:
    """Weights against filters."""
    return _with_blocks(published.TABLE_4, scale, _top)


def table_5(scale: Scale) -> list[Row]:
    """Weights: the paper's, and candidates for those whose formulas are missing."""
    paper = published.TABLE_5
    columns = (*paper.columns, *[name for name in _CANDIDATES if name != "C"])
    more = (None,) * (len(columns) - len(paper.columns))
    lines = {line: (*figures, *more) for line, figures in paper.lines.items()}
    small = scale.name == "small"

    def at(line: Line, column: str) -> Readings | str:
        if column not in _CANDIDATES:
            return "its formula is missing in the text at hand"
        # The small policy stands for the only one of this table.
        pairing = Pairing.of(published.OPT_1_3B if small else line[0])
        return run_on(scale, pairing, line[1], lambda setting: setting.cw(**_CANDIDATES[column]))

    return rows_of(Table(columns, lines), at)


def table_10(scale: Scale) -> list[Row]:
    """Filters, OPT."""
    return _with_blocks(published.TABLE_10, scale, _top)


def table_11(scale: Scale) -> list[Row]:
    """Filters, Qwen."""
    return _with_blocks(published.TABLE_11, scale, _top)


def table_16(scale: Scale) -> list[Row]:
    """Models of different families. The small scale's two always are."""
    small = scale.name == "small"

    def at(line: Line, column: str) -> Readings | str:
        is_first = line[0] == "OPT-125M → Qwen2.5-14B"
        pairing = Pairing.of(published.OPT_13B if small and is_first else line[0])
        if small and not is_first:
            return "one policy at this scale"
        return run_on(scale, pairing, line[1], _THREE[column])

    return rows_of(published.TABLE_16, at)


def table_21(scale: Scale) -> list[Row]:
    """Online alignment by a reward model, and by two annotators."""

    def trained(column: str) -> Trained:
        def online_policy(setting: Setting) -> tuple[Output, Output]:
            parts = setting.material.parts
            _, start = setting.cw()
            judges: Mapping[str, tuple[Place, str]] = {
                "Online DPO": (setting.material.judge, "none"),
                "Online CW-DPO": (_hosted(setting, "bt"), "confidence"),
                "Online WS-DPO": (_hosted(setting, "sft+dpo"), "none"),
            }
            judge, weight = judges[column]
            made = online(
                scale,
                start,
                parts.unlabelled,
                judge,
                setting.seed,
                setting.material.max_length,
                label="online",
                weight=weight,
            )
            return made, start

        return online_policy

    def measured(column: str) -> Measure:
        # Online DPO is trained on the labels of the reward model that judges it.
        own = column == "Online DPO"
        more: dict[str, Any] = {"allow_annotator_as_judge": True} if own else {}
        return lambda setting, made, start, _: setting.accuracy(made, start, **more)

    return _with_blocks(published.TABLE_21, scale, trained, measured)


def _hosted(setting: Setting, objective: str) -> Place:
    """The annotator itself, rather than its labels."""
    served = setting.labelled_by(objective).step.serves
    assert served is not None  # noqa: S101
    return served


def table_22(scale: Scale) -> list[Row]:
    """Online and offline alignment by the same annotator."""
    from_21 = {
        row.line: row.readings or row.missing
        for row in table_21(scale)
        if row.column == "Online CW-DPO"
    }

    def at(line: Line, column: str) -> Readings | str:
        if "online" in column:
            return from_21[line]
        name = _stand_in(scale, line[1], set())
        return run_on(scale, Pairing.of(line[0]), name, Setting.cw)

    return rows_of(published.TABLE_22, at)


def table_23(scale: Scale) -> list[Row]:
    """Domains of Stanford Human Preferences."""

    def at(line: Line, column: str) -> Readings | str:
        return run_on(scale, Pairing.of(line[1]), line[0], _THREE[column])

    return rows_of(published.TABLE_23, at)


def table_24(scale: Scale) -> list[Row]:
    """Labels out of balance."""
    pairing = Pairing.of(published.OPT_1_3B)

    def at(line: Line, column: str) -> Readings | str:
        measured, _, method = column.partition(": ")

        def read(seed: int) -> tuple[Reading, ...]:
            shared = material(scale, measured, seed)
            setting = Setting(scale, pairing, shared, seed)
            objective = "bt" if method == "CW-DPO" else "sft+dpo"
            made, _ = mixture_annotator(scale, _MIXTURES[line[1]], seed, objective)
            unlabelled = {name: material(scale, name, seed).parts.unlabelled for name in BOTH}
            labels = weighted(made, mixed(unlabelled, (0.5, 0.5), seed))
            weight = "confidence" if method == "CW-DPO" else "none"
            return (setting.accuracy(*setting.policy(labels, "mixture", weight=weight)),)

        return unavailable(scale, *BOTH) or _missing(scale, pairing, measured) or read

    return rows_of(published.TABLE_24, at)


def table_25(scale: Scale) -> list[Row]:
    """Poisoned labels."""
    pairing = Pairing.of(published.OPT_1_3B)

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            setting = Setting(scale, pairing, material(scale, "Harmless", seed), seed)
            is_cw = line[1] == "CW-DPO"
            objective, weight = ("bt", "confidence") if is_cw else ("sft+dpo", "none")
            share = int(column.rstrip("%")) / 100
            labels = weighted(*poisoned_annotator(scale, share, seed, objective))
            return (setting.accuracy(*setting.policy(labels, "poisoned", weight=weight)),)

        return unavailable(scale, *BOTH) or _missing(scale, pairing, "Harmless") or read

    return rows_of(published.TABLE_25, at)


def table_26(scale: Scale) -> list[Row]:
    """PairRM as annotator."""
    small = scale.name == "small"
    pair_rm: Trained = lambda setting: setting.policy(setting.labelled_by("pairrm"), "pairrm")  # noqa: E731

    def at(line: Line, column: str) -> Readings | str:
        pairing = Pairing.of(published.OPT_1_3B if small else line[0])
        name = _stand_in(scale, line[1], set())
        return run_on(scale, pairing, name, {**_THREE, "PairRM": pair_rm}[column])

    return rows_of(published.TABLE_26, at)


def figure_2(scale: Scale) -> list[Row]:
    """Filters, the mean of the two pairs of models in Tables 10 and 11."""
    tables = (table_10(scale), table_11(scale))

    def mean(first: float | None, second: float | None) -> float | None:
        return None if first is None or second is None else (first + second) / 2

    def both(first: Row, second: Row) -> Readings | None:
        found = [row.readings for row in (first, second) if row.readings is not None]
        return (lambda seed: tuple(one for each in found for one in each(seed))) if found else None

    return [
        Row(
            ("mean over models", first.line[1]),
            first.column,
            both(first, second),
            first.missing,
            mean(first.paper, second.paper),
        )
        for first, second in zip(*tables, strict=True)
    ]


def figure_3_left(scale: Scale) -> list[Row]:
    """Share of labels, while one half of the pairs is what policies are trained on."""
    pairing = Pairing.of(published.OPT_1_3B)
    name = _stand_in(scale, "HH-RLHF", set())

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            shared = material(scale, name, seed, 0.5)
            share = int(column.rstrip("%")) / 50
            fewer = split(shared.parts.labelled, seed, labelled=share, label="fewer")
            own = Setting(scale, pairing, shared, seed)
            is_cw = line[1] == "CW-DPO"
            objective, weight = ("bt", "confidence") if is_cw else ("sft+dpo", "none")
            made = annotator(
                scale,
                fewer / "labelled.jsonl",
                seed,
                weak=pairing.weak,
                objective=objective,
                max_length=shared.max_length,
            )
            labels = weighted(made, shared.parts.unlabelled)
            return (own.accuracy(*own.policy(labels, "fewer", weight=weight)),)

        return _missing(scale, pairing, name) or read

    columns = tuple(f"{share}%" for share in _SHARES)
    lines = {("50% unlabelled", method): (None,) * len(columns) for method in ("WS-DPO", "CW-DPO")}
    return rows_of(Table(columns, lines), at)


def figure_3_right(scale: Scale) -> list[Row]:
    """Labels on which the policy is trained itself, or an annotator of the other pairs."""
    pairing = Pairing.of(published.OPT_1_3B)
    name = _stand_in(scale, "HH-RLHF", set())
    columns = tuple(f"{share}%" for share in (*_SPLITS, 100))

    def at(line: Line, column: str) -> Readings | str:
        share = int(column.rstrip("%")) / 100
        if line[1] == "CW-DPO":
            if share == 1:
                return "nothing is left to annotate"
            return run_on(scale, pairing, name, Setting.cw, share)

        def direct(setting: Setting) -> tuple[Output, Output]:
            parts = setting.material.parts
            labels = parts.everything if share == 1 else parts.labelled
            return setting.policy(labels, "human", human=True, weight="none")

        return run_on(scale, pairing, name, direct, min(share, 0.9))

    def paper(method: str) -> tuple[float | None, ...]:
        return tuple(published.FIGURE_3_RIGHT.get(f"{method}, {column}") for column in columns)

    lines = {("all pairs", method): paper(method) for method in ("DPO", "CW-DPO")}
    return rows_of(Table(columns, lines), at)


def figure_4(scale: Scale) -> list[Row]:
    """Filters of all thresholds; the figure has no numbers."""
    columns = (*[f"{percent}%" for percent in _TOPS], "CW-DPO")
    lines = {(published.OPT_1_3B, name): (None,) * len(columns) for name in (*BOTH, "HH-RLHF")}
    return _with_blocks(Table(columns, lines), scale, _top)


def figure_5(scale: Scale) -> list[Row]:
    """Reward of CW-DPO's answers against that of answers by human labels."""
    small = scale.name == "small"
    pairing = Pairing.of(published.OPT_1_3B if small else published.QWEN_7B)

    def at(line: Line, column: str) -> Readings | str:
        def read(seed: int) -> tuple[Reading, ...]:
            shared = material(scale, line[1], seed)
            setting = Setting(scale, pairing, shared, seed)
            policy, baseline = setting.cw()[0], setting.human()[0]
            evaluation = setting.evaluation([policy], baseline)
            read_of = gold_reward_accuracy if column == "higher, %" else reward_gap
            return (read_of(evaluation, policy),)

        return _missing(scale, pairing, line[1]) or read

    names = (*BOTH, "HH-RLHF", "TL;DR")
    lines = {(published.QWEN_7B, name): (None, None) for name in names}
    return rows_of(Table(("higher, %", "mean gap"), lines), at)


_paper = partial(Recipe, measure=_GRA)
POLICY_RECIPES = (
    _paper("table-1", "CW-PO with three losses", rows=table_1, averages=True),
    _paper("table-2", "Size of the policy", rows=table_2, averages=True),
    _paper("table-3", "30 % of the labels against all", rows=table_3, averages=True),
    _paper("table-4", "Weights against filters", rows=table_4, averages=True),
    _paper("table-5", "Weight functions", rows=table_5, averages=True),
    _paper("table-10", "Filters by confidence, OPT", rows=table_10, averages=True),
    _paper("table-11", "Filters by confidence, Qwen2.5", rows=table_11, averages=True),
    _paper("table-16", "Annotator and policy of different families", rows=table_16),
    Recipe(
        "table-17",
        "Win rates by an LLM",
        "answers that win against the chosen response, %",
        table_17,
        averages=True,
    ),
    _paper(
        "table-20",
        "Table 1 with deviations",
        rows=table_20,
        averages=True,
        spread_of_thirds=True,
    ),
    _paper("table-21", "Online alignment", rows=table_21),
    _paper("table-22", "Online against offline alignment", rows=table_22),
    _paper("table-23", "Domains of SHP", rows=table_23),
    _paper("table-24", "Labels out of balance", rows=table_24),
    _paper("table-25", "Poisoned labels", rows=table_25),
    _paper("table-26", "PairRM as the annotator", rows=table_26, averages=True),
    _paper("figure-2", "Filters by confidence, mean over models", rows=figure_2, drawing="bars"),
    _paper("figure-3-left", "Share of labels", rows=figure_3_left, drawing="lines"),
    _paper(
        "figure-3-right",
        "Labels for the policy or for an annotator",
        rows=figure_3_right,
        drawing="lines",
    ),
    _paper("figure-4", "Filters of all thresholds", rows=figure_4, drawing="lines"),
    Recipe(
        "figure-5",
        "Rewards of CW-DPO and of human labels",
        "answers of CW-DPO with the higher reward, and mean of its reward less that of Human",
        figure_5,
        drawing="bars",
    ),
)
