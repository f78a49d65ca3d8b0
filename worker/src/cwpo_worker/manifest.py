"""What a job was cut into; published last, so that what it lists is there."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from cwpo.columns import Column
from cwpo.types import Truncation
from cwpo_worker.store import BlobStore


class Shard(BaseModel):
    """The rows of one shard: how many, and the numbers of the first and the last."""

    model_config = ConfigDict(extra="forbid")

    index: int
    rows: int
    first_row: int
    last_row: int


class Manifest(BaseModel):
    """The plan of a job.

    rejected: rows that are in no shard, with their reasons in the job's rejected rows.
    columns: what the input has beside its triplets.
    """

    model_config = ConfigDict(extra="forbid")

    job_id: str
    input_sha256: str
    truncation: Truncation
    rejected: int
    columns: list[Column] = []
    shards: list[Shard]

    @property
    def rows(self) -> int:
        """Rows of the input, blank lines aside."""
        return self.rejected + sum(shard.rows for shard in self.shards)


class JobFolder:
    """The keys of a job's blobs.

    Args:
        edition: of the manifest and the results. What a cancelled job has finished is an edition
            of its own: the job may be resumed and cancelled again, and no blob is ever replaced.
    """

    def __init__(self, job_id: str, edition: int | None = None) -> None:
        self._edition = "" if edition is None else f"-{edition}"
        self.path = f"jobs/{job_id}"
        self.manifest = f"{self.path}/manifest{self._edition}.json"
        self.rejected = f"{self.path}/rejected.jsonl"
        self.parts = f"{self.path}/parts"
        self.errors = f"{self.path}/errors{self._edition}.jsonl"

    def shard(self, index: int) -> str:
        """The rows that the shard task reads."""
        return f"{self.path}/shards/{index:05d}.parquet"

    def part(self, index: int) -> str:
        """What became of them; its existence says that the shard is done."""
        return f"{self.parts}/{index:05d}.parquet"

    def results(self, format: str) -> str:
        """The weighted dataset."""
        return f"{self.path}/results{self._edition}.{format}"

    def read_manifest(self, store: BlobStore) -> Manifest:
        """Raises: BlobNotFoundError while the job is not planned."""
        return Manifest.model_validate_json(store.read(self.manifest))
