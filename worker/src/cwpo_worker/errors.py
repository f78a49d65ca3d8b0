"""Expected failures of jobs, files, the store and the queue."""

from __future__ import annotations

from cwpo.errors import CwpoError


class StoreError(CwpoError):
    """The blob store cannot be reached, read or written; the message says which."""


class StoreFullError(StoreError):
    """An upload would fill the disk, of which some is reserved for records and results."""


class BlobNotFoundError(StoreError):
    """The store has no blob of this name."""


class DigestMismatchError(CwpoError):
    """The received bytes of an upload do not have the checksum that was sent with them."""


class FileQuotaError(CwpoError):
    """An owner's files would take more bytes than the owner may store."""


class WaitingRowsError(CwpoError):
    """So many rows of an owner's jobs are waiting that the owner may submit no further job."""


class UnknownFileError(CwpoError):
    """No file has this id, or it belongs to another owner."""


class InputRefusedError(CwpoError):
    """A job named an input that it may not read, or the service accepts uploaded files only."""


class FileInUseError(CwpoError):
    """A job that has not ended needs the file."""


class UnknownJobError(CwpoError):
    """No job has this id, or it belongs to another owner."""


class RecoveringError(UnknownJobError):
    """Redis has lost the job's record, which is being restored from the store."""


class DamagedRecordError(CwpoError):
    """This version cannot read the record of a job."""


class IllegalTransitionError(CwpoError):
    """The job's state does not allow the requested change."""


class IdempotencyConflictError(CwpoError):
    """An idempotency key was used before for a different request."""


class InvalidCursorError(CwpoError):
    """A page of jobs was requested with a cursor that is not the next_cursor of another page."""


class QueueUnavailableError(CwpoError):
    """Redis (or Valkey) does not answer, or refuses a command."""


class JobStoppedError(CwpoError):
    """A task found that its job is no longer in a state that needs the task."""


class UnknownPartError(CwpoError):
    """The dataset of a job has no part of this name."""


class DatasetFormError(CwpoError):
    """The dataset of a job is not there in the form that was asked for, but in another."""


class ModelChangedError(CwpoError):
    """The parts of a job are of different annotators."""


class OtherModelError(CwpoError):
    """The service answered with another annotator than the job is pinned to."""


class PoisonedShardError(CwpoError):
    """The service fails on so many rows of a shard that the rows are not the cause."""


class IncompleteJobError(CwpoError):
    """The parts of a job do not match its manifest."""


class ValkeyError(CwpoError):
    """The embedded Valkey server cannot be started."""


class UnknownReviewError(CwpoError):
    """There is no such review, or row of it, or it is another owner's."""


class NoUncertainRowError(CwpoError):
    """No row of a dataset is as uncertain as a review asks for."""


class NothingToUndoError(CwpoError):
    """A person has given no answer that could be withdrawn."""
