"""What can go wrong with jobs, files and the places that hold them."""

from __future__ import annotations

from cwpo.errors import CwpoError


class StoreError(CwpoError):
    """The blob store cannot be reached, read or written; the message says which."""


class BlobNotFoundError(StoreError):
    """The store has no blob of this name."""


class DigestMismatchError(CwpoError):
    """An upload came in as other bytes than were sent."""


class UnknownFileError(CwpoError):
    """No file has this id, or it belongs to another owner."""


class InputRefusedError(CwpoError):
    """A job named an input that it may not read, or named one where the service takes none."""


class FileInUseError(CwpoError):
    """A job that has not ended needs the file."""


class UnknownJobError(CwpoError):
    """No job has this id, or it belongs to another owner."""


class IllegalTransitionError(CwpoError):
    """The job's state does not allow what was asked of it."""


class IdempotencyConflictError(CwpoError):
    """An idempotency key was used again for something else."""


class InvalidCursorError(CwpoError):
    """A cursor that no page of jobs gave."""


class QueueUnavailableError(CwpoError):
    """Redis (or Valkey) does not answer, or refuses what is asked of it."""


class JobStoppedError(CwpoError):
    """A task found that its job is no longer in a state that wants the task's work."""


class ModelChangedError(CwpoError):
    """The service changed its annotator while a job was under way."""


class PoisonedShardError(CwpoError):
    """The service fails on so many rows of a shard that they cannot all be at fault."""


class IncompleteJobError(CwpoError):
    """The parts of a job do not add up to its manifest."""


class ValkeyError(CwpoError):
    """The embedded Valkey server cannot be started."""
