"""The record of a job, and the one table of how its state may change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from cwpo.types import FINAL_STATES, Job, JobState
from cwpo_worker.errors import IllegalTransitionError

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    "validating": frozenset({"queued", "failed", "cancelling"}),
    # A job without a row to annotate has no shard, and a restored one may have all its parts.
    "queued": frozenset({"running", "finalizing", "failed", "cancelling"}),
    "running": frozenset({"finalizing", "failed", "cancelling"}),
    "finalizing": frozenset({"completed", "completed_with_errors", "failed"}),
    "cancelling": frozenset({"cancelled"}),
    "completed": frozenset(),
    "completed_with_errors": frozenset(),
    # Resumed, a job is planned again, which finds what was finished before.
    "failed": frozenset({"validating"}),
    "cancelled": frozenset({"validating"}),
}


class JobRecord(Job):
    """A job as the queue and the store know it: what the contract shows, and what it does not.

    owner: the name of the API key that submitted it; None where no keys are set.
    version: changes so far; the higher of two records of a job is the newer.
    shard_rows: rows a shard, fixed at submission so that a second planning cuts the same shards.
    shards, rejected: how many shards were planned, and how many rows never got into one.
    edition: names the results of a job that was cancelled when some of its shards were finished.
    input_url, input_version: of an input that was not uploaded, where it is, and as what.
    deleted: nobody sees it any more, and what it left behind is being removed.
    """

    owner: str | None = None
    version: int = 0
    shard_rows: int
    shards: int | None = None
    rejected: int = 0
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
        return self.model_copy(update={"state": state, **changes})

    def public(self) -> Job:
        """What the REST contract shows of it."""
        return Job(**{name: getattr(self, name) for name in Job.model_fields})


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)
