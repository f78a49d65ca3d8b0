"""Labelled pairs, read from files and from the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from cwpo.errors import DatasetError, first_line
from cwpo.types import Prompt, Triplet
from cwpo_annotator.encoding import transcript
from cwpo_trainer.data.rows import COUNTED_AT_ONCE, file_rows, is_tie, triplet_in
from cwpo_trainer.data.unused_rows import BadRowError, NumberedRow, Row, UnusedRows
from cwpo_trainer.run.chunks import counted


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """A prompt, the response that a person chose and the one that they rejected.

    chosen_first: whether the chosen one stood first, as response_a; None where no order is known.
    source: where the pair is from, if its row says so in the column `source`.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    chosen_first: bool | None = field(default=None, compare=False)
    source: str | None = None

    @property
    def triplet(self) -> Triplet:
        """The pair without its label; response_a is the chosen one."""
        return Triplet(
            id=self.id, prompt=self.prompt, response_a=self.chosen, response_b=self.rejected
        )


def read_pairs(source: str, unused: UnusedRows | None = None) -> list[LabelledPair]:
    """All of `labelled_pairs`."""
    return [*labelled_pairs(source, unused)]


def labelled_pairs(source: str, unused: UnusedRows | None = None) -> Iterator[LabelledPair]:
    """The labelled pairs of a file or Hub dataset, in order, without bad rows and ties.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file, a folder of Parquet files, or a Hub id
            `owner/name[/folder][@split]`.
        unused: takes the rows that are left out; without it, a bad row is an error.
    Raises: DatasetError for a source that cannot be read, or naming the first of too many bad rows.
    """
    return pairs_of(source_rows(source), source, unused)


def source_rows(source: str) -> Iterator[NumberedRow]:
    """The numbered rows of a file or Hub dataset; see `labelled_pairs`. Raises: DatasetError."""
    path = Path(source)
    if path.exists():
        return file_rows(path)
    if _looks_like_hub_id(source):
        return _hub_rows(source)
    raise DatasetError(f"{source}: no such file (and a Hub id looks like owner/name)")


def read_unlabelled(path: Path, unused: UnusedRows) -> list[Triplet]:
    """The triplets of a file or a folder of parts, in order, whether or not they are labelled.

    Args:
        unused: takes the rows that are left out.
    Raises: DatasetError for a file that cannot be read, or naming the first of too many bad rows.
    """

    def triplet(number: int, row: Row) -> Triplet:
        return triplet_in(number, row if isinstance(row, str) else _with_prompt(row))

    triplets = [*unused.used(file_rows(path), path, triplet)]
    if not triplets:
        raise DatasetError(f"{path}: holds no triplets")
    return triplets


def pairs_of(
    rows: Iterable[NumberedRow], source: str, unused: UnusedRows | None = None
) -> Iterator[LabelledPair]:
    """The labelled pairs in numbered rows, as of `labelled_pairs`.

    A row has prompt, response_a, response_b and preferred ("a", "b" or "tie"), or prompt, chosen
    and rejected, or chosen and rejected alone as whole transcripts or whole conversations.
    """
    is_empty = True
    for pair in (unused or UnusedRows()).used(rows, source, _pair):
        is_empty = False
        yield pair
    if is_empty:
        raise DatasetError(f"{source}: holds no pairs")


def fingerprint(pairs: Iterable[LabelledPair]) -> str:
    """Fingerprint of the pairs: 16 hex digits of a hash over all texts, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        fields = [prompt_key(pair.prompt), pair.chosen, pair.rejected]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:16]


def prompt_key(prompt: Prompt) -> str:
    """The prompt as one text, for comparisons."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[message.role, message.content] for message in prompt])


def _pair(number: int, row: Row) -> LabelledPair | None:
    """The pair in a row; None for a tie. Raises: BadRowError."""
    triplet = triplet_in(number, row if isinstance(row, str) else _with_prompt(row))
    if is_tie(triplet, row):
        return None
    chosen, rejected = triplet.response_a, triplet.response_b
    chosen_first = None
    if isinstance(row, dict) and "response_a" in row:
        preferred = row.get("preferred")
        if preferred not in ("a", "b"):
            raise BadRowError.invalid(f'preferred is "a", "b" or "tie", not {preferred!r}')
        chosen_first = preferred == "a"
        if not chosen_first:
            chosen, rejected = rejected, chosen
    source = row.get("source") if isinstance(row, dict) else None
    return LabelledPair(
        str(triplet.id),
        triplet.prompt,
        chosen,
        rejected,
        chosen_first,
        source if isinstance(source, str) else None,
    )


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt apart, where chosen and rejected hold the whole dialogue."""
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


def hub_dataset(source: str) -> str | None:
    """The Hub id, owner/name, of a source as of `read_pairs`; None of a file or folder."""
    if Path(source).exists() or not _looks_like_hub_id(source):
        return None
    return "/".join(source.partition("@")[0].split("/")[:2])


def _hub_rows(source: str) -> Iterator[NumberedRow]:
    from datasets import load_dataset

    where, _, part = source.partition("@")
    owner, name, *folder = where.split("/")
    try:
        rows = load_dataset(
            f"{owner}/{name}", data_dir="/".join(folder) or None, split=part or "train"
        )
    except Exception as error:  # datasets raises whatever its loaders and the network raise
        reason = first_line(error)
        raise DatasetError(
            f"{source}: neither a file nor a dataset that can be loaded from the Hub: {reason}"
        ) from error
    numbered = enumerate(rows, start=1)
    yield from counted(numbered, COUNTED_AT_ONCE, work=f"read {source}", unit="rows")
