"""The plan of a job: the shards of its input, and the keys of its blobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, model_validator

from cwpo.columns import Column
from cwpo.types import Truncation
from cwpo_worker.errors import BlobNotFoundError
from cwpo_worker.jobs.shard_ranges import Ranges, joined, numbers_in
from cwpo_worker.storage.store import BlobStore


class Continuation(BaseModel):
    """What the plan of the next file has to know of the files before it.

    files: how many files these are.
    checksums: theirs.
    last_row: number of their last row.
    is_chat: whether their prompts are chat messages; None if no row was valid.
    first_rejected: the first row that was rejected, and why.
    kinds: the kinds of the values in each extra column, as `Columns` has learned them.
    characters: length of the texts of the rows that fill no shard yet, and are in a blob of their
        own (`JobFolder.open_shard`): the next shard begins with them.
    """

    files: int = 0
    checksums: list[str] = []
    last_row: int = 0
    is_chat: bool | None = None
    first_rejected: str | None = None
    kinds: dict[str, list[str]] = {}
    characters: int = 0


class Manifest(BaseModel):
    """The plan of a job, or of its first files; it is published after the shards that it names.

    Every task reads it, so it does not grow with the job: what rows a shard has is in its part.

    rows: number of rows of the input, without blank lines.
    rejected: how many of them are in no shard; they are in files of rejected rows.
    columns: the extra columns of the input.
    shards: the numbers of the shards.
    continuation: where the plan of the other files begins; None once all are planned.
    checkpoint: the number of shards, if this was published in the midst of the plan that begins
        there; None at its end. A plan that is interrupted begins again, not at its checkpoints.
    """

    job_id: str
    input_sha256: str
    truncation: Truncation
    rows: int
    rejected: int
    columns: list[Column] = []
    shards: Ranges
    continuation: Continuation | None = None
    checkpoint: int | None = None

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
    def is_whole(self) -> bool:
        """Whether all files are planned."""
        return self.continuation is None

    @property
    def next_file(self) -> int | None:
        """The number of the file that the next plan begins with; None once all are planned."""
        return None if self.continuation is None else self.continuation.files

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
        self.plans = f"{self.path}/plans"
        self.rejected = f"{self.path}/rejected.jsonl"
        self.parts = f"{self._annotated}/parts"
        self.errors = f"{self._annotated}/errors{self._edition}.jsonl"
        self.dataset = f"{self._annotated}/dataset{self._edition}.json"
        self.shards = f"{self.path}/shards"

    def first_files(self, files: int, checkpoint: int | None = None) -> str:
        """The manifest of the first files of an input that has more, or one in the midst of it."""
        return f"{self._plan(files, checkpoint)}.json"

    def open_shard(self, files: int) -> str:
        """The rows of these files that fill no shard yet."""
        return f"{self._plan(files)}.parquet"

    def rejected_up_to(self, files: int, checkpoint: int | None = None) -> str:
        """The rows that were rejected between the manifest before this one and this one."""
        return f"{self._plan(files, checkpoint)}.jsonl"

    def shard(self, index: int) -> str:
        """The rows that the shard task reads."""
        return f"{self.shards}/{index:05d}.parquet"

    def part(self, index: int) -> str:
        """The annotated rows of the shard; it exists once the shard is finished."""
        return f"{self.parts}/{index:05d}.parquet"

    def completed_part(self, index: int) -> str:
        """A part with columns of the dataset that were not known when it was annotated."""
        return f"{self._annotated}/dataset{self._edition}/{index:05d}.parquet"

    def page(self, number: int) -> str:
        """A page of the list of the dataset's parts."""
        return f"{self._annotated}/dataset{self._edition}/{number:05d}.json"

    def results(self, format: str) -> str:
        """The weighted dataset as a single file, if it is small."""
        return f"{self._annotated}/results{self._edition}.{format}"

    def read_manifest(self, store: BlobStore) -> Manifest:
        """The manifest, or the last one so far as long as not all files are planned.

        Raises: BlobNotFoundError while there is neither.
        """
        try:
            return Manifest.model_validate_json(store.read(self.manifest))
        except BlobNotFoundError:
            planned = [key for key in store.list(self.plans) if key.endswith(".json")]
            if not planned:
                raise
            return Manifest.model_validate_json(store.read(planned[-1]))

    def rejected_files(
        self, store: BlobStore, files: int, checkpoint: int | None = None
    ) -> list[str]:
        """The files of rejected rows that plans have left up to a manifest, in order."""
        last = self.rejected_up_to(files, checkpoint)
        return [key for key in store.list(self.plans) if key.endswith(".jsonl") and key <= last]

    def _plan(self, files: int, checkpoint: int | None = None) -> str:
        """What the plan of these files has published, in order."""
        midst = "" if checkpoint is None else f"_{checkpoint:08d}"
        return f"{self.plans}/{files:05d}{midst}"
