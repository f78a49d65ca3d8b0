"""`cwpo worker`: one process that carries out batch jobs."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from cwpo.client import Client
from cwpo.commands import ServiceCommand

# A batch request waits for all interactive ones, on what may be a slow annotator.
REQUEST_SECONDS = 1800.0

RetentionDays = Annotated[
    float | None,
    Field(
        gt=0,
        description="ended jobs, and files that no job uses, are deleted after so many days; "
        "without it they are kept until somebody deletes them",
    ),
]


class Worker(ServiceCommand):
    """Carry out batch jobs: plan, annotate through the service, merge.

    Start as many as you like, on any machine that reaches the service, Redis and the store.
    SIGTERM or Ctrl-C ends it after the task at hand; what a killed one had is done by another.

    Example:
        cwpo worker --url http://127.0.0.1:8000 --redis-url redis://127.0.0.1:6379/0 \\
            --store-url s3://bucket/cwpo
    """

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="of Redis or Valkey: redis://:PASSWORD@HOST:PORT/0, rediss:// for TLS; "
        "with a password better set as CWPO_REDIS_URL than as a flag",
    )
    store_url: str = Field(description="folder or fsspec URL (s3://...) that the service uses too")
    burst: bool = Field(False, description="end when the queue is empty")
    heartbeat_seconds: int = Field(
        24, ge=3, description="a worker silent for so long loses its task to another"
    )

    retention_days: RetentionDays = None

    def cli_cmd(self) -> None:
        """Work until stopped."""
        from cwpo_worker.process import WorkerProcess

        with Client(self.url, self.api_key, timeout=REQUEST_SECONDS) as client:
            WorkerProcess(
                client,
                self.redis_url,
                self.store_url,
                heartbeat_seconds=self.heartbeat_seconds,
                kept=None if self.retention_days is None else timedelta(days=self.retention_days),
            ).run(burst=self.burst)
