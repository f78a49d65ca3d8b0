"""Collects blobs that belong to no record: of uploads that crashed, and of deleted jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

import redis

from cwpo_worker.errors import BlobNotFoundError
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import recorded_blobs

INTERVAL_SECONDS = 600
# How many files and jobs are looked at in a round, which so takes no longer however many there are.
SLICE_FOLDERS = 200
# What is younger may get its record yet: an upload takes a while.
SAFE_SECONDS = 24 * 3600
# Set for as long as nobody has to look again.
LOOKED = "cwpo:collected"
# The last folder that was looked at.
_PLACE = "cwpo:collected:place"

log = logging.getLogger(__name__)


def collect_unrecorded(redis: redis.Redis, store: BlobStore) -> None:
    """Look at the next few files and jobs, and remove old blobs that belong to no record.

    Runs at most every ten minutes, however often it is called.
    Raises: redis.RedisError, StoreError.
    """
    if not redis.set(LOOKED, 1, nx=True, ex=INTERVAL_SECONDS):
        return
    last = (cast("bytes | None", redis.get(_PLACE)) or b"").decode()
    folders = [*store.list("files"), *store.list("jobs")]
    here = [folder for folder in folders if folder > last][:SLICE_FOLDERS]
    for folder in here:
        collect = _collect_job if folder.startswith("jobs/") else _collect_file
        with suppress(BlobNotFoundError):  # It was deleted meanwhile.
            collect(store, folder)
    redis.set(_PLACE, here[-1] if len(here) == SLICE_FOLDERS else "")


def _collect_file(store: BlobStore, folder: str) -> None:
    """Remove data without a record, and data that another upload with its key sent."""
    unrecorded = set(store.list(folder)) - recorded_blobs(store, folder)
    if unrecorded:
        written = store.written(folder)
        _delete(store, [key for key in unrecorded if _is_old([written.get(key)])])


def _collect_job(store: BlobStore, folder: str) -> None:
    """Remove what has no record: left or written when the job was deleted, or never submitted."""
    if store.exists(f"{folder}/job.json"):
        return
    written = store.written(folder)
    if _is_old(written.values()):
        _delete(store, written)


def _is_old(written: Iterable[float | None]) -> bool:
    limit = time.time() - SAFE_SECONDS
    return all(moment is not None and moment < limit for moment in written)


def _delete(store: BlobStore, keys: Iterable[str]) -> None:
    for key in keys:
        log.info("%s belongs to no record: it is removed", key)
        store.delete(key)
