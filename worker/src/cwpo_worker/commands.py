"""`cwpo worker`: one process that works on batch jobs."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cwpo.client import Client
from cwpo.commands.service_command import ServiceCommand

# A batch request waits until all interactive ones are answered, perhaps by a slow annotator.
REQUEST_SECONDS = 1800.0
# A rolling update of a fleet takes minutes, and each replica loads its model.
MODEL_WAIT_SECONDS = 3600.0

RetentionDays = Annotated[
    float | None,
    Field(
        gt=0,
        description="Days after which ended jobs, and files that no job uses, are deleted; by "
        "default they are kept until somebody deletes them.",
    ),
]

DiscardShards = Annotated[
    bool,
    Field(
        description="Remove the shards of a job, copies of its input, as soon as its dataset is "
        "published; otherwise they are removed with the job.",
    ),
]


ModelWait = Annotated[
    float,
    Field(
        ge=0,
        description="Seconds that a job waits while no replica of the service hosts the annotator "
        "that it began with; then it fails, and can be resumed.",
    ),
]


class Worker(ServiceCommand):
    """Run a worker, which splits the inputs of batch jobs, has them annotated, and merges them.

    Start any number of workers, on any machines that can reach the service, Redis and the store.
    On SIGTERM or Ctrl-C a worker finishes its current shard and exits. If a worker is killed,
    another one takes its task.

    Example:
        cwpo worker --url http://127.0.0.1:8000 --redis-url redis://127.0.0.1:6379/0 \\
            --store-url s3://bucket/cwpo
    """

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="URL of the Redis or Valkey server of the job queue: "
        "redis://:PASSWORD@HOST:PORT/0, or rediss:// for TLS. Set a URL with a password as "
        "CWPO_REDIS_URL rather than as a flag, which other users of the machine can see.",
    )
    store_url: str = Field(
        description="Folder or fsspec URL (s3://...) of uploads and results; the same as the "
        "--store-url of `cwpo serve`."
    )
    former_url: str | None = Field(
        None,
        description="URL of a second service, which still hosts the annotator that the first one "
        "had: jobs that began with it go on with it. None by default.",
    )
    burst: bool = Field(False, description="Exit when no task waits in the queue.")
    heartbeat_seconds: int = Field(
        24,
        ge=3,
        description="Seconds without a heartbeat after which a worker counts as dead and its task "
        "is given to another one.",
    )
    heartbeat_file: Path | None = Field(
        None,
        description="File to touch at each sign of life, every minute at least, busy or not: a "
        "probe that finds it older than three minutes may end the worker. None by default.",
    )
    model_wait: ModelWait = MODEL_WAIT_SECONDS
    retention_days: RetentionDays = None
    discard_shards: DiscardShards = False

    def cli_cmd(self) -> None:
        """Work until stopped."""
        from cwpo_worker.process import WorkerProcess

        with ExitStack() as stack:

            def client(url: str) -> Client:
                return stack.enter_context(Client(url, self.api_key, timeout=REQUEST_SECONDS))

            WorkerProcess(
                client(self.url),
                self.redis_url,
                self.store_url,
                former=None if self.former_url is None else client(self.former_url),
                heartbeat_seconds=self.heartbeat_seconds,
                heartbeat_file=self.heartbeat_file,
                model_wait=timedelta(seconds=self.model_wait),
                kept=None if self.retention_days is None else timedelta(days=self.retention_days),
                discard_shards=self.discard_shards,
            ).run(burst=self.burst)
