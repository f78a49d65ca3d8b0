"""Splitting labelled pairs by conversation, so that no part continues a prompt of another."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cwpo.datasets.weighted import JsonlWriter
from cwpo.errors import DatasetError
from cwpo_trainer.data.conversations import beginnings
from cwpo_trainer.data.labelled import LabelledPair
from cwpo_trainer.data.labelled_file import labelled_row
from cwpo_trainer.run.chunks import chunks

_WRITTEN_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Split:
    """Three sets of pairs without a common conversation: labelled, unlabelled and held out."""

    labelled: list[LabelledPair]
    unlabelled: list[LabelledPair]
    held_out: list[LabelledPair]


def sample(pairs: Sequence[LabelledPair], count: int | None, *, seed: int) -> list[LabelledPair]:
    """At most `count` pairs, chosen at random, in their order; all of them for None."""
    if count is None or count >= len(pairs):
        return list(pairs)
    kept = random.Random(seed).sample(range(len(pairs)), count)  # noqa: S311
    return [pairs[at] for at in sorted(kept)]


def split(
    pairs: Sequence[LabelledPair],
    *,
    labelled_fraction: float,
    held_out_fraction: float,
    seed: int,
) -> Split:
    """Split by conversation: all pairs of one stay together, whichever of its turns they are of.

    Args:
        labelled_fraction: share of the pairs that are not held out, in (0, 1].
        held_out_fraction: share of all pairs, in [0, 1).
    Raises: DatasetError when a part that was asked for stays empty.
    """
    groups = _shuffled_by_conversation(pairs, seed)
    conversations = len(groups)
    held_out = _take(groups, round(held_out_fraction * len(pairs)))
    rest = len(pairs) - len(held_out)
    labelled = _take(groups, round(labelled_fraction * rest))
    unlabelled = [pair for group in groups for pair in group]
    if not labelled or (held_out_fraction > 0 and not held_out):
        raise DatasetError(
            f"{len(pairs)} pairs (conversations: {conversations}) are too few to hold out "
            f"{held_out_fraction:.0%} and label {labelled_fraction:.0%} of the rest"
        )
    return Split(labelled, unlabelled, held_out)


def validation_split(
    pairs: Sequence[LabelledPair], fraction: float, *, seed: int
) -> tuple[list[LabelledPair], list[LabelledPair]]:
    """Pairs to train on, and a share of them, by conversation, to validate and calibrate on.

    Raises: DatasetError when a part that was asked for stays empty.
    """
    if fraction == 0:
        return list(pairs), []
    groups = _shuffled_by_conversation(pairs, seed)
    validation = _take(groups, round(fraction * len(pairs)))
    training = [pair for group in groups for pair in group]
    if not validation or not training:
        raise DatasetError(
            f"{len(pairs)} labelled pairs are too few to validate on {fraction:.0%} of them: "
            "give more, or --validation-fraction 0"
        )
    return training, validation


def write_splits(parts: Split, folder: Path, *, seed: int) -> None:
    """Write labelled.jsonl, unlabelled.jsonl and held_out.jsonl into the folder.

    All have the columns id, prompt, response_a, response_b, preferred, with a and b in random
    order, and source where it is known. `preferred` is the person's label; `cwpo annotate` does not
    read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = random.Random(seed)  # noqa: S311
    named = {
        "labelled": parts.labelled,
        "unlabelled": parts.unlabelled,
        "held_out": parts.held_out,
    }
    for name, pairs in named.items():
        with (folder / f"{name}.jsonl").open("wb") as sink:
            writer = JsonlWriter(sink)
            for chunk in chunks(pairs, _WRITTEN_AT_ONCE, work=f"write {name}.jsonl", unit="pairs"):
                writer.write(
                    labelled_row(pair, a_is_chosen=order.random() >= 0.5) for pair in chunk
                )


def _shuffled_by_conversation(
    pairs: Sequence[LabelledPair], seed: int
) -> deque[list[LabelledPair]]:
    """The pairs of each conversation, the conversations in random order."""
    groups: dict[str, list[LabelledPair]] = {}
    for pair, beginning in zip(pairs, beginnings([each.prompt for each in pairs]), strict=True):
        groups.setdefault(beginning, []).append(pair)
    order = list(groups.values())
    random.Random(seed).shuffle(order)  # noqa: S311
    return deque(order)


def _take(groups: deque[list[LabelledPair]], wanted: int) -> list[LabelledPair]:
    """The first groups, removed from `groups`, with about `wanted` pairs in all."""
    taken: list[LabelledPair] = []
    while groups and len(taken) + len(groups[0]) / 2 <= wanted:
        taken.extend(groups.popleft())
    return taken
