"""The way to files and batch jobs: the blob store and the job queue, where there are such."""

from __future__ import annotations

from dataclasses import dataclass

from cwpo_service.settings import ServeSettings
from cwpo_worker.connection import connect
from cwpo_worker.files import FileCatalog
from cwpo_worker.inputs import InputPrefix
from cwpo_worker.ledger import Ledger
from cwpo_worker.store import BlobStore

_REDIS_SECONDS = 5.0


@dataclass(frozen=True)
class Jobs:
    """Uploaded files and the jobs on them. All calls block: make them on a thread."""

    store: BlobStore
    files: FileCatalog
    ledger: Ledger

    @classmethod
    def open(cls, settings: ServeSettings) -> Jobs | None:
        """The ones that the settings name, None where they name none."""
        if settings.redis_url is None or settings.store_url is None:
            return None
        redis = connect(settings.redis_url.get_secret_value(), timeout=_REDIS_SECONDS)
        store = BlobStore(settings.store_url)
        inputs = None if settings.input_prefix is None else InputPrefix(settings.input_prefix)
        return cls(store, FileCatalog(store), Ledger(redis, store, inputs))

    def check(self) -> None:
        """Raises: StoreError or QueueUnavailableError for the one that cannot be reached."""
        self.store.check()
        self.ledger.check()
