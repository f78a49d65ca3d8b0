"""Labelled pairs: reading them from files and the Hub, and splitting them by prompt."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cwpo.datasets import (
    JsonlWriter,
    NumberedTriplet,
    file_format,
    parse_triplet,
    read_rows,
)
from cwpo.errors import DatasetError
from cwpo.types import Prompt, Triplet
from cwpo_trainer import transcript

Row = tuple[int, dict[str, Any] | str]


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """A prompt, the response that a person chose and the one that they rejected."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Split:
    """Three sets of pairs that share no prompt: D_L, D_U and what is kept for measuring."""

    labelled: list[LabelledPair]
    unlabelled: list[LabelledPair]
    held_out: list[LabelledPair]


def read_pairs(source: str) -> list[LabelledPair]:
    """The labelled pairs of a file or Hub dataset, in order.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file, or a Hub id `owner/name[/folder][@split]`.
    Raises: DatasetError for a source that cannot be read, or naming the first bad row: what a model
        is trained on has to be right.
    """
    path = Path(source)
    if path.is_file():
        with path.open("rb") as stream:
            return pairs_of(read_rows(stream, file_format(path)), source)
    if _looks_like_hub_id(source):
        return pairs_of(_hub_rows(source), source)
    raise DatasetError(f"{source}: no such file (and a Hub id looks like owner/name)")


def pairs_of(rows: Iterable[Row], source: str) -> list[LabelledPair]:
    """The labelled pairs in numbered rows. Raises: DatasetError naming the first bad row.

    A row has prompt, response_a, response_b and preferred ("a" or "b"), or prompt, chosen and
    rejected, or chosen and rejected alone as whole transcripts or whole conversations.
    """
    pairs = []
    for number, row in rows:
        pair = _pair(number, row if isinstance(row, str) else _with_prompt(row))
        if isinstance(pair, str):
            raise DatasetError(f"{source}: row {number}: {pair}")
        pairs.append(pair)
    if not pairs:
        raise DatasetError(f"{source}: holds no pairs")
    return pairs


def sample(pairs: Sequence[LabelledPair], count: int | None, *, seed: int) -> list[LabelledPair]:
    """At most `count` of the pairs, drawn at random, in their order; all of them for None."""
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
    """Split by prompt: all pairs of one prompt stay together.

    Args:
        labelled_fraction: share of the pairs that are not held out, in (0, 1].
        held_out_fraction: share of all pairs, in [0, 1).
    Raises: DatasetError when a part that was asked for stays empty.
    """
    groups = _by_prompt(pairs)
    prompts = len(groups)
    random.Random(seed).shuffle(groups)  # noqa: S311
    held_out = _take(groups, round(held_out_fraction * len(pairs)))
    rest = len(pairs) - len(held_out)
    labelled = _take(groups, round(labelled_fraction * rest))
    unlabelled = [pair for group in groups for pair in group]
    if not labelled or (held_out_fraction > 0 and not held_out):
        raise DatasetError(
            f"{len(pairs)} pairs over {prompts} prompts are too few to hold out "
            f"{held_out_fraction:.0%} and label {labelled_fraction:.0%} of the rest"
        )
    return Split(labelled, unlabelled, held_out)


def validation_split(
    pairs: Sequence[LabelledPair], fraction: float, *, seed: int
) -> tuple[list[LabelledPair], list[LabelledPair]]:
    """Labelled pairs to train on, and a share of them by prompt to validate and calibrate on.

    Raises: DatasetError when a part that was asked for stays empty.
    """
    if fraction == 0:
        return list(pairs), []
    groups = _by_prompt(pairs)
    random.Random(seed).shuffle(groups)  # noqa: S311
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
    order. `preferred` is the person's label; `cwpo annotate` does not read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = random.Random(seed)  # noqa: S311
    for name in ("labelled", "unlabelled", "held_out"):
        with (folder / f"{name}.jsonl").open("wb") as sink:
            JsonlWriter(sink).write(
                _row(pair, swapped=order.random() < 0.5) for pair in getattr(parts, name)
            )


def fingerprint(pairs: Iterable[LabelledPair]) -> str:
    """What tells these pairs from any others: 16 hex digits over all texts, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        fields = [prompt_key(pair.prompt), pair.chosen, pair.rejected]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:16]


def prompt_key(prompt: Prompt) -> str:
    """The prompt as text to compare by."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[message.role, message.content] for message in prompt])


def _by_prompt(pairs: Sequence[LabelledPair]) -> list[list[LabelledPair]]:
    groups: dict[str, list[LabelledPair]] = {}
    for pair in pairs:
        groups.setdefault(prompt_key(pair.prompt), []).append(pair)
    return list(groups.values())


def _take(groups: list[list[LabelledPair]], wanted: int) -> list[LabelledPair]:
    """Groups off the front until there are `wanted` pairs or nearest below the next group."""
    taken: list[LabelledPair] = []
    while groups and len(taken) + len(groups[0]) / 2 <= wanted:
        taken.extend(groups.pop(0))
    return taken


def _row(pair: LabelledPair, *, swapped: bool) -> dict[str, Any]:
    triplet = Triplet(
        id=pair.id,
        prompt=pair.prompt,
        response_a=pair.rejected if swapped else pair.chosen,
        response_b=pair.chosen if swapped else pair.rejected,
    )
    return {**triplet.model_dump(), "preferred": "b" if swapped else "a"}


def _pair(number: int, row: dict[str, Any] | str) -> LabelledPair | str:
    """The pair, or what is wrong with the row."""
    parsed = parse_triplet(number, row)
    if not isinstance(parsed, NumberedTriplet):
        return parsed.error.detail
    triplet = parsed.triplet
    chosen, rejected = triplet.response_a, triplet.response_b
    if isinstance(row, dict) and "response_a" in row:
        preferred = row.get("preferred")
        if preferred not in ("a", "b"):
            return f'preferred is "a" or "b", not {preferred!r}'
        if preferred == "b":
            chosen, rejected = rejected, chosen
    if chosen == rejected:
        return "both responses are the same"
    return LabelledPair(str(triplet.id), triplet.prompt, chosen, rejected)


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a prompt of its own, where chosen and rejected hold the whole dialogue."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and row.get("prompt") is None:
        parts = transcript.split_last_common_turn(chosen, rejected)
        if parts is not None:
            return {**row, **dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))}
    elif _is_conversation(chosen) and _is_conversation(rejected) and chosen[:-1] == rejected[:-1]:
        return {**row, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return row


def _is_conversation(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) > 1


def _looks_like_hub_id(source: str) -> bool:
    parts = source.split("@", maxsplit=1)[0].split("/")
    return len(parts) >= 2 and all(parts) and parts[0] not in (".", "..", "~")


def _hub_rows(source: str) -> Iterator[Row]:
    from datasets import load_dataset

    where, _, part = source.partition("@")
    owner, name, *folder = where.split("/")
    try:
        rows = load_dataset(
            f"{owner}/{name}", data_dir="/".join(folder) or None, split=part or "train"
        )
    except Exception as error:  # datasets raises whatever its loaders and the network raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(
            f"{source}: neither a file nor a dataset that the Hub gives: {reason}"
        ) from error
    yield from enumerate(rows, start=1)
