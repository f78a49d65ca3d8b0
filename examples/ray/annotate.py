"""Annotate triplets with Ray Data, for clusters that have outgrown workers and Redis.

    python examples/ray/annotate.py triplets/ --annotator runs/demo/annotator --output weighted/

The files are read in parallel, and each GPU has an actor with an annotator of its own. The output
is the folder that a batch job gives: parts, the manifest dataset.json, and errors.jsonl. After an
interruption, repeat the command: the parts that are there stay.

Without RAY_ADDRESS, Ray is started on this machine. On a cluster, input, annotator and output have
to be on a file system that all machines share.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray

from cwpo.columns import Column, Columns
from cwpo.datasets.folder import DatasetFolder
from cwpo.datasets.triplets import (
    NumberedTriplet,
    RejectedRow,
    file_format,
    read_rows,
    triplet_files,
    triplets_of,
)
from cwpo.datasets.weighted import JsonlWriter
from cwpo.errors import CwpoError, DatasetError
from cwpo.partial_file import partial_file
from cwpo.types import DatasetColumn, DatasetPart, DatasetParts, Truncation
from cwpo_annotator import Annotator
from cwpo_worker.steps.part import read_part, write_part
from cwpo_worker.steps.shard_rows import ShardRows, numbered_triplets, read_shard
from cwpo_worker.storage.store import BlobStore

SHARD_ROWS = 2048
SHARD_CHARACTERS = 32 << 20


@dataclass(frozen=True)
class Survey:
    """What has to be known of each file before a row of the input can be annotated.

    rows: number of its rows. is_chat: whether its prompts are chat messages; None if no row is
    valid. columns: the extra columns of its rows.
    """

    path: Path
    rows: int
    is_chat: bool | None
    columns: Columns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="file or folder of JSONL or Parquet triplets")
    parser.add_argument("--annotator", required=True, help="checkpoint folder, or null to test")
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--actors", type=int, help="number of annotators (default: one per GPU)")
    parser.add_argument("--truncation", choices=["error", "prompt_left"], default="error")
    asked = parser.parse_args()
    try:
        annotate(asked.input, asked.annotator, asked.output, asked.actors, asked.truncation)
    except CwpoError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


def annotate(
    source: Path, annotator: str, output: Path, actors: int | None, truncation: Truncation
) -> None:
    """Write the dataset. Raises: DatasetError for an input or an output that cannot be used."""
    files = [path.resolve() for path in triplet_files(source)]
    ray.init(log_to_driver=False)
    surveys = ray.get([survey.remote(path) for path in files])
    expect_one_kind(surveys)
    columns = Columns()
    for each in surveys:
        columns.learn_from(each.columns)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    shards = ray.data.from_items(numbered(surveys), override_num_blocks=len(surveys))
    finished = (
        shards.flat_map(shards_of)
        .map_batches(
            Annotating,
            fn_constructor_args=(annotator, str(output.resolve()), columns.known(), truncation),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors or max(1, gpus)),
            num_gpus=1 if gpus else 0,
            # If actors held all cores, no task could read the files for them.
            num_cpus=0,
        )
        .take_all()
    )
    publish(output, finished)


@ray.remote
def survey(path: Path) -> Survey:
    """Read a file once, without keeping its rows."""
    rows, is_chat, columns = 0, None, Columns()
    with path.open("rb") as source:
        for item in triplets_of(read_rows(source, file_format(path))):
            rows = item.row
            if isinstance(item, NumberedTriplet):
                columns.learn(item.extra)
                is_chat = not isinstance(item.triplet.prompt, str) if is_chat is None else is_chat
    return Survey(path, rows, is_chat, columns)


def expect_one_kind(surveys: Sequence[Survey]) -> None:
    """Raises: DatasetError unless the prompts of all files are text, or of all are chat."""
    for before, after in pairwise(each for each in surveys if each.is_chat is not None):
        if before.is_chat != after.is_chat:
            raise DatasetError(
                f"of {before.path.name} and {after.path.name}, one has text prompts and the other "
                "chat messages: annotate them apart"
            )


def numbered(surveys: Sequence[Survey]) -> list[dict[str, Any]]:
    """Each file with the number of rows before it, as rows are counted through all files."""
    before = accumulate((each.rows for each in surveys), initial=0)
    return [
        {"path": str(each.path), "before": count}
        for each, count in zip(surveys, before, strict=False)
    ]


def shards_of(file: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The valid rows of a file, a shard at a time, with the lines of the rejected ones."""
    path = Path(file["path"])
    rows, rejected = ShardRows(), []
    with path.open("rb") as source:
        numbered_rows = (
            (number + file["before"], row) for number, row in read_rows(source, file_format(path))
        )
        for item in triplets_of(numbered_rows):
            if isinstance(item, RejectedRow):
                rejected.append(item.as_dict())
            else:
                rows.add(item)
            if len(rows.numbers) == SHARD_ROWS or rows.characters >= SHARD_CHARACTERS:
                yield shard(rows, rejected)
                rows, rejected = ShardRows(), []
    if rows.numbers or rejected:
        yield shard(rows, rejected)


def shard(rows: ShardRows, rejected: list[dict[str, Any]]) -> dict[str, Any]:
    content = io.BytesIO()
    if rows.numbers:
        rows.write(content)
    return {"rows": content.getvalue(), "rejected": json.dumps(rejected)}


class Annotating:
    """An annotator in an actor of its own, which writes the part of each shard that it is given."""

    def __init__(
        self, annotator: str, output: str, columns: Sequence[Column], truncation: Truncation
    ) -> None:
        is_null = annotator == "null"
        self._annotator = Annotator.null() if is_null else Annotator.load(annotator)
        self._store = BlobStore(output)
        self._columns = columns
        self._truncation = truncation

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """The part (JSON, or empty) and the lines of the errors file of each shard."""
        answers: dict[str, list[str]] = {"part": [], "errors": []}
        for content, rejected in zip(batch["rows"], batch["rejected"], strict=True):
            part, failed = self._part(content) if content else ("", [])
            answers["part"].append(part)
            answers["errors"].append(json.dumps([*json.loads(rejected), *failed]))
        return answers

    def _part(self, content: bytes) -> tuple[str, list[dict[str, Any]]]:
        rows = read_shard(content)
        name = self._name(rows["row"][0].as_py(), content)
        if not self._store.exists(name):
            triplets = [row.triplet for row in numbered_triplets(rows)]
            labels = self._annotator.annotate(triplets, self._truncation)
            write_part(self._store, name, rows, labels, self._annotator.model, extra=self._columns)
        part = read_part(self._store, name)
        described = DatasetPart(
            name=name,
            rows=part.counts.annotated,
            bytes=len(part.content),
            sha256=sha256(part.content).hexdigest(),
        )
        return described.model_dump_json(), part.errors

    def _name(self, first_row: int, content: bytes) -> str:
        """The name of a part; another input or annotator gives another name, and so no mixture."""
        columns = [column.model_dump() for column in self._columns]
        made_by = json.dumps([self._annotator.model.revision, self._truncation, columns])
        digest = sha256(content + made_by.encode()).hexdigest()
        return f"part-{first_row:012d}-{digest[:16]}.parquet"


def publish(output: Path, finished: Sequence[Mapping[str, str]]) -> None:
    """Write the errors file and the manifest. Raises: DatasetError for parts of another run."""
    found = [DatasetPart.model_validate_json(row["part"]) for row in finished if row["part"]]
    errors = [line for row in finished for line in json.loads(row["errors"])]
    parts = []
    for part in sorted(found, key=attrgetter("name")):
        if part.rows:
            parts.append(part)
        else:
            (output / part.name).unlink()
    schema = pq.read_schema(output / parts[0].name) if parts else ()
    dataset = DatasetParts(
        parts=parts,
        columns=[DatasetColumn(name=field.name, type=str(field.type)) for field in schema],
        rows=sum(part.rows for part in parts),
        bytes=sum(part.bytes for part in parts),
    )
    folder = DatasetFolder(output, dataset)
    with partial_file(output / "errors.jsonl") as sink:
        JsonlWriter(sink).write(sorted(errors, key=itemgetter("row")))
    folder.publish()
    print(f"{output}: {dataset.rows:,} rows in {len(parts):,} parts, {len(errors):,} errors")


if __name__ == "__main__":
    main()
