"""How long ended jobs and uploads are kept."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import redis

from cwpo.types import FINAL_STATES
from cwpo_worker.errors import (
    FileInUseError,
    IllegalTransitionError,
    UnknownFileError,
    UnknownJobError,
)
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.record import now
from cwpo_worker.jobs.registry import JobRegistry
from cwpo_worker.storage.uploads import FileCatalog

INTERVAL_SECONDS = 600
# Set for as long as nobody has to look again.
LOOKED = "cwpo:expired"


def delete_expired(
    redis: redis.Redis,
    registry: JobRegistry,
    files: FileCatalog,
    ledger: Ledger,
    kept: timedelta,
) -> None:
    """Delete jobs that ended more than `kept` ago, and files of that age that no job uses.

    Runs at most every ten minutes, however often it is called.
    Raises: redis.RedisError, StoreError.
    """
    if not redis.set(LOOKED, 1, nx=True, ex=INTERVAL_SECONDS):
        return
    limit = now() - kept
    used: set[str] = set()
    for _, record in registry.newest(None):
        ended = record.finished_at if record.state in FINAL_STATES else None
        if ended is None or ended >= limit:
            used.update(record.files)
            continue
        with suppress(UnknownJobError, IllegalTransitionError):  # It was deleted or resumed.
            ledger.delete(record.id, owner=None)
    for file in files.all():
        if file.created_at < limit and file.id not in used:
            with suppress(UnknownFileError, FileInUseError):
                ledger.delete_file(file.id, owner=None)
