"""How long ended jobs and uploads are kept."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

from cwpo.types import FINAL_STATES
from cwpo_worker.errors import (
    FileInUseError,
    IllegalTransitionError,
    UnknownFileError,
    UnknownJobError,
)
from cwpo_worker.job import now
from cwpo_worker.ledger import Ledger

INTERVAL_SECONDS = 600
# Set for as long as nobody has to look again.
LOOKED = "cwpo:expired"


def expire(ledger: Ledger, kept: timedelta) -> None:
    """Delete the jobs that ended so long ago, and the files that old that no job has left.

    It looks every ten minutes, however often it is called. Raises: redis.RedisError, StoreError.
    """
    if not ledger.redis.set(LOOKED, 1, nx=True, ex=INTERVAL_SECONDS):
        return
    limit = now() - kept
    used = set()
    for _, record in ledger.records.newest(None):
        ended = record.finished_at if record.state in FINAL_STATES else None
        if ended is None or ended >= limit:
            used.add(record.file_id)
            continue
        with suppress(UnknownJobError, IllegalTransitionError):  # It was deleted or resumed.
            ledger.delete(record.id, owner=None)
    for file in ledger.files.all():
        if file.created_at < limit and file.id not in used:
            with suppress(UnknownFileError, FileInUseError):
                ledger.delete_file(file.id, owner=None)
