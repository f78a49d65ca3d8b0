"""The record of a job, and the table of permitted changes of its state."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from cwpo.errors import mistake_in
from cwpo.types import FINAL_STATES, Job, JobState
from cwpo_worker.errors import DamagedRecordError, IllegalTransitionError, JobStoppedError
from cwpo_worker.jobs.manifest import JobFolder, Manifest

# The first shards of a job are annotated while its last ones are planned.
PLANNING_STATES: tuple[JobState, ...] = ("validating", "queued", "running")
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    "validating": frozenset({"queued", "failed", "cancelling"}),
    # A job without a row to annotate has no shard, and a restored one may have all its parts.
    "queued": frozenset({"running", "finalizing", "failed", "cancelling"}),
    "running": frozenset({"finalizing", "failed", "cancelling"}),
    "finalizing": frozenset({"completed", "completed_with_errors", "failed", "cancelling"}),
    "cancelling": frozenset({"cancelled"}),
    "completed": frozenset(),
    "completed_with_errors": frozenset(),
    # Resumed, a job is planned again, which finds what was finished before.
    "failed": frozenset({"validating"}),
    "cancelled": frozenset({"validating"}),
}


class JobRecord(Job, extra="allow"):
    """A job in the queue and the store, with the fields of the REST contract and these:

    owner: name of the API key that submitted the job; None if the service has no keys.
    version: number of changes so far; of two records of a job, the higher one is newer.
    shard_rows: triplets per shard, or rows that are as much work, fixed at submission, so that
        planning again gives the same shards.
    files_planned, rows_planned: number of input files and of rows that are planned.
    shards, rejected: number of shards that are planned, and of rows that are in no shard.
    repins: number of times that all rows were to be annotated anew.
    edition: names the results of a job that was cancelled when some of its shards were finished.
    input_url, input_version: location and version of an input that was not uploaded.
    deleted: the job is hidden, and its blobs are being removed.

    Fields of a newer version are kept when this one changes a record: during an upgrade both work
    on the same jobs.
    """

    owner: str | None = None
    version: int = 0
    shard_rows: int
    files_planned: int = 0
    rows_planned: int = 0
    shards: int | None = None
    rejected: int = 0
    repins: int = 0
    edition: int | None = None
    deleted: bool = False
    input_url: str | None = None
    input_version: str | None = None

    def moved(self, state: JobState, **changes: Any) -> JobRecord:
        """The record in a new state. Raises: IllegalTransitionError if the table forbids it."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"job {self.id} is {self.state}: it cannot be {state} now")
        if state in FINAL_STATES:
            changes["finished_at"] = now()
        return self.model_copy(update={"state": state, "waiting": None, **changes})

    def with_planned(self, manifest: Manifest) -> JobRecord:
        """The record once this is planned; itself, if that or more is planned already.

        The job is queued as soon as it has a shard, or its input has none.
        Raises: JobStoppedError if it was stopped.
        """
        if self.state not in PLANNING_STATES:
            raise JobStoppedError(f"job {self.id} is {self.state}")
        next_file = manifest.next_file
        known = (self.files_planned, self.rows_planned)
        if self.is_planned or (next_file is not None and (next_file, manifest.rows) <= known):
            return self
        changes: dict[str, Any] = {
            "rows_planned": manifest.rows,
            "rejected": manifest.rejected,
            "shards": manifest.shard_count,
        }
        if next_file is None:
            changes["progress"] = self.progress.model_copy(update={"rows_total": manifest.rows})
        else:
            changes["files_planned"] = next_file
        if self.state == "validating" and (manifest.shards or manifest.is_whole):
            return self.moved("queued", **changes)
        return self.model_copy(update=changes)

    def check_continues(self, begun: JobRecord) -> None:
        """Raises: JobStoppedError if all rows are annotated anew since the work on `begun`."""
        if self.repins != begun.repins:
            raise JobStoppedError(f"job {self.id} is annotated anew by another annotator")

    @property
    def is_planned(self) -> bool:
        """Whether all of its input is planned: until then, nobody knows how many rows it has."""
        return self.progress.rows_total is not None

    @property
    def rows_known(self) -> int:
        """Number of rows of what is planned of its input."""
        total = self.progress.rows_total
        return self.rows_planned if total is None else total

    @property
    def folder(self) -> JobFolder:
        """Where its blobs are."""
        return JobFolder(self.id, self.edition, repins=self.repins)

    @property
    def files(self) -> list[str]:
        """The ids of the uploads that the job reads, in order."""
        return [self.file_id] if self.file_id is not None else self.file_ids or []

    @classmethod
    def parse(cls, data: bytes, job_id: str) -> JobRecord:
        """Read a stored record. Raises: DamagedRecordError if it is not valid."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise DamagedRecordError(
                f"the record of job {job_id} cannot be read: {mistake_in(error)}"
            ) from None

    def public(self) -> Job:
        """The job as the REST contract shows it."""
        return Job(**{name: getattr(self, name) for name in Job.model_fields})


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)
