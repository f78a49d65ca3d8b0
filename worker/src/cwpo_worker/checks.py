"""The worker's check of `cwpo doctor`: Redis, and the store."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import redis

from cwpo import checks
from cwpo.findings import Finding, Places
from cwpo_worker.errors import QueueUnavailableError, StoreError
from cwpo_worker.queue.connection import connect, queue_errors
from cwpo_worker.storage.store import BlobStore

_ANSWER_SECONDS = 10.0
_PROBE = b"cwpo doctor\n"


def worker(places: Places) -> Iterator[Finding]:
    """Redis, and the store."""
    if places.redis_url is None:
        yield Finding("skipped", "redis", "no URL is named: set --redis-url or CWPO_REDIS_URL")
    else:
        yield from queue(places.redis_url)
    if places.store_url is None:
        yield Finding("skipped", "store", "no URL is named: set --store-url or CWPO_STORE_URL")
    else:
        yield from store(places.store_url)


def queue(url: str) -> Iterator[Finding]:
    """Whether Redis can be reached, keeps all keys, and keeps them over a restart."""
    try:
        with queue_errors(), connect(url, timeout=_ANSWER_SECONDS) as connection:
            info = cast("dict[str, Any]", connection.info())
            seconds, microseconds = cast("tuple[int, int]", connection.time())
            now = time.time()
            snapshots = _snapshots(connection)
    except QueueUnavailableError as error:
        fix = "start Redis or Valkey there, or correct --redis-url or CWPO_REDIS_URL"
        yield Finding("wrong", "redis", str(error), fix)
        return
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version", info["redis_version"])
    yield Finding("ok", "redis", f"{name} {version}, {info['used_memory_human']} of memory used")
    yield from _redis_problems(info, snapshots)
    yield checks.clock(name, now - (seconds + microseconds / 1e6))


def store(url: str) -> Iterator[Finding]:
    """Whether a blob can be written, read, kept as it is, and deleted."""
    if "://" not in url and not Path(url).is_dir():
        yield Finding("warning", "store", f"{url} is no folder yet", "the service will create it")
        return
    key = f"doctor-{uuid.uuid4().hex}"
    try:
        blobs = BlobStore(url)
        try:
            with blobs.create(key) as first:
                first.write(_PROBE)
            with blobs.create(key) as second:
                second.write(_PROBE * 2)
            kept = blobs.read(key) == _PROBE
        finally:
            blobs.delete(key)
        blobs.check_space(0)
    except StoreError as error:
        fix = "look at its permissions, credentials and room, or correct --store-url"
        yield Finding("wrong", "store", str(error), fix)
        return
    if kept:
        yield Finding("ok", "store", f"{url}: a probe was written, read and deleted")
    else:
        said = f"{url} let a blob be written over: it ignores If-None-Match"
        yield Finding("wrong", "store", said, "use another store: jobs would mix their parts")


def _redis_problems(info: dict[str, Any], snapshots: str | None) -> Iterator[Finding]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        said = f"it deletes keys when its memory is full (maxmemory-policy {policy})"
        fix = "`CONFIG SET maxmemory-policy noeviction`, and the same in its configuration"
        yield Finding("wrong", "redis", said, fix)
    if info.get("role") == "slave":
        said = "it is a replica, which cannot be written"
        yield Finding("wrong", "redis", said, "name its primary in --redis-url")
    limit = info.get("maxmemory", 0)
    if limit and info["used_memory"] > 0.9 * limit:
        said = f"{info['used_memory'] / limit:.0%} of its maxmemory are used"
        yield Finding("warning", "redis", said, "raise maxmemory, or delete old jobs")
    if not info.get("aof_enabled") and snapshots == "":
        said = "it keeps nothing over a restart; jobs are then restored from the store"
        fix = "`CONFIG SET appendonly yes`, so that restarts cost no time"
        yield Finding("warning", "redis", said, fix)
    for status in ("aof_last_write_status", "rdb_last_bgsave_status"):
        if info.get(status, "ok") != "ok":
            said = f"it cannot write its data to disk ({status} {info[status]})"
            yield Finding("wrong", "redis", said, "look at its disk and its log")


def _snapshots(connection: redis.Redis) -> str | None:
    """When it writes snapshots, empty for never; None where it does not tell."""
    with suppress(redis.ResponseError):
        return str(cast("dict[str, Any]", connection.config_get("save")).get("save"))
    return None
