"""Ways to train a policy or an annotator, and those that test_combinations.py trains by.

The tables of them in docs/cluster.md are written from here, by docs/tables.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Literal, NamedTuple, get_args

from cwpo_annotator.checkpoint import Objective
from cwpo_trainer.losses import LOSSES

Weights = Literal["full", "LoRA", "QLoRA"]
Processes = Literal["one", "DDP", "FSDP2", "ZeRO-3"]
Reference = Literal["none", "on the fly", "precomputed"]


def on_a_command_line(settings: Mapping[str, str | bool | float]) -> tuple[str, ...]:
    """Settings as flags."""
    flags: list[str] = []
    for name, value in settings.items():
        flags.append(f"--{name.replace('_', '-')}")
        flags += [] if value is True else [str(value)]
    return tuple(flags)


class Combination(NamedTuple):
    """A way to train a policy.

    objective: `sft`, or a loss of `align`.
    """

    objective: str
    weights: Weights
    reference: Reference
    processes: Processes

    @property
    def command(self) -> str:
        return "sft" if self.objective == "sft" else "align"

    @property
    def settings(self) -> dict[str, str | bool | float]:
        """Its settings, without those of the size of a run."""
        objective: dict[str, str | bool | float] = {"loss": self.objective}
        if self.objective == "sft":
            # Of LoRA, so that two runs are comparable.
            objective = {} if self.weights == "full" else {"lora_dropout": 0.0}
        reference = {"precompute_reference": True} if self.reference == "precomputed" else {}
        return {**objective, **WEIGHTS[self.weights], **reference, **_SHARDING[self.processes]}

    @property
    def flags(self) -> tuple[str, ...]:
        """These on a command line."""
        return on_a_command_line(self.settings)

    def __str__(self) -> str:
        return ", ".join(self)


class AnnotatorCombination(NamedTuple):
    """A way to train an annotator."""

    objective: Objective
    weights: Weights
    processes: Processes

    @property
    def command(self) -> str:
        return "train-annotator"

    @property
    def settings(self) -> dict[str, str | bool | float]:
        """Its settings, without those of the size of a run."""
        lora = {} if self.weights == "full" else {**WEIGHTS[self.weights], "lora_dropout": 0.0}
        return {"objective": self.objective, **lora, **_SHARDING[self.processes]}

    @property
    def flags(self) -> tuple[str, ...]:
        """These on a command line."""
        return on_a_command_line(self.settings)

    def __str__(self) -> str:
        return ", ".join(("annotator", *self))


WEIGHTS: dict[Weights, dict[str, bool]] = {
    "full": {},
    "LoRA": {"lora": True},
    "QLoRA": {"lora": True, "load_in_4bit": True},
}
PROCESSES: dict[Processes, str] = {
    "one": "1 process",
    "DDP": "2 processes (DDP)",
    "FSDP2": "2 processes (FSDP2)",
    "ZeRO-3": "ZeRO-3",
}
"""In the table."""
_SHARDING: dict[Processes, dict[str, str]] = {
    "one": {},
    "DDP": {},
    "FSDP2": {"sharding": "fsdp2"},
    "ZeRO-3": {"sharding": "zero3"},
}

WITH_REFERENCE = tuple(name for name, loss in LOSSES.items() if loss.reads_reference)
WITHOUT_REFERENCE = tuple(name for name, loss in LOSSES.items() if not loss.reads_reference)
GROUPS: dict[tuple[str, ...], tuple[Reference, ...]] = {
    WITH_REFERENCE: ("on the fly", "precomputed"),
    WITHOUT_REFERENCE: ("none",),
    ("sft",): ("none",),
}
"""Objectives that differ in a formula alone, of which the first is trained; how they may read a
reference."""


_REFUSED = {
    ("LoRA", "precomputed"),
    *(("QLoRA", reference) for reference in ("none", "on the fly", "precomputed")),
}


def _each(processes: Processes) -> tuple[Combination, ...]:
    return tuple(
        Combination(objectives[0], weights, reference, processes)
        for objectives, references in GROUPS.items()
        for weights, reference in product(WEIGHTS, references)
    )


ONE = _each("one")
"""Trained in one process."""
TWO = (
    *_each("DDP"),
    *(each for each in _each("FSDP2") if (each.weights, each.reference) not in _REFUSED),
)
"""Trained in two processes, on CPUs."""
TESTED = frozenset((*ONE, *TWO))

OF_ANNOTATORS: tuple[Objective, ...] = get_args(Objective)
ANNOTATOR_WEIGHTS: tuple[Weights, ...] = ("full", "LoRA")


def _annotators(processes: Processes) -> tuple[AnnotatorCombination, ...]:
    ways = product(OF_ANNOTATORS, ANNOTATOR_WEIGHTS)
    return tuple(AnnotatorCombination(*way, processes) for way in ways)


ANNOTATORS_ONE = _annotators("one")
"""Trained in one process."""
ANNOTATORS_TWO = (*_annotators("DDP"), *_annotators("FSDP2"))
"""Trained in two processes, on CPUs."""
TESTED_ANNOTATORS = frozenset((*ANNOTATORS_ONE, *ANNOTATORS_TWO))
