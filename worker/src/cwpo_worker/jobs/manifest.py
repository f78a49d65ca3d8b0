"""The plan of a job: the shards of its input, and the keys of its blobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, model_validator

from cwpo.columns import Column
from cwpo.types import Truncation
from cwpo_worker.jobs.shard_ranges import Ranges, joined, numbers_in
from cwpo_worker.storage.store import BlobStore


class Manifest(BaseModel):
    """The plan of a job; it is published last, so that every shard that it names exists.

    Every task reads it, so it does not grow with the job: what rows a shard has is in its part.

    rows: number of rows of the input, without blank lines.
    rejected: how many of them are in no shard; they are in the job's file of rejected rows.
    columns: the extra columns of the input.
    shards: the numbers of the shards.
    """

    job_id: str
    input_sha256: str
    truncation: Truncation
    rows: int
    rejected: int
    columns: list[Column] = []
    shards: Ranges

    @model_validator(mode="before")
    @classmethod
    def _of_0_2(cls, data: Any) -> Any:
        """Version 0.2 listed the shards, each with its rows."""
        if not isinstance(data, dict) or "rows" in data:
            return data
        listed = data.get("shards", [])
        rows = data.get("rejected", 0) + sum(shard["rows"] for shard in listed)
        shards = joined((shard["index"], shard["index"] + 1) for shard in listed)
        return {**data, "rows": rows, "shards": shards}

    @property
    def numbers(self) -> Iterator[int]:
        """The numbers of the shards, ascending."""
        return numbers_in(self.shards)

    @property
    def shard_count(self) -> int:
        """How many shards there are."""
        return sum(stop - start for start, stop in self.shards)


class JobFolder:
    """The keys of a job's blobs.

    Args:
        edition: distinguishes manifests and results of the same job. Each cancellation has its own
            edition, since a job can be resumed and cancelled again, and blobs are never replaced.
        repins: number of times that all rows were to be annotated anew. What each annotator made is
            in a folder of its own; the shards are the same for all.
    """

    def __init__(self, job_id: str, edition: int | None = None, *, repins: int = 0) -> None:
        self._edition = "" if edition is None else f"-{edition}"
        self.path = f"jobs/{job_id}"
        self._annotated = f"{self.path}/repin-{repins}" if repins else self.path
        self.manifest = f"{self.path}/manifest{self._edition}.json"
        self.inputs = f"{self.path}/inputs.json"
        self.rejected = f"{self.path}/rejected.jsonl"
        self.parts = f"{self._annotated}/parts"
        self.errors = f"{self._annotated}/errors{self._edition}.jsonl"
        self.dataset = f"{self._annotated}/dataset{self._edition}.json"
        self.shards = f"{self.path}/shards"

    def shard(self, index: int) -> str:
        """The rows that the shard task reads."""
        return f"{self.shards}/{index:05d}.parquet"

    def part(self, index: int) -> str:
        """The annotated rows of the shard; it exists once the shard is finished."""
        return f"{self.parts}/{index:05d}.parquet"

    def page(self, number: int) -> str:
        """A page of the list of the dataset's parts."""
        return f"{self._annotated}/dataset{self._edition}/{number:05d}.json"

    def results(self, format: str) -> str:
        """The weighted dataset as a single file, if it is small."""
        return f"{self._annotated}/results{self._edition}.{format}"

    def read_manifest(self, store: BlobStore) -> Manifest:
        """Raises: BlobNotFoundError while the job is not planned."""
        return Manifest.model_validate_json(store.read(self.manifest))
