"""`cwpo serve` and `cwpo up`."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, SecretStr

from cwpo.cli import Command
from cwpo.errors import ConfigError
from cwpo.exit_codes import ExitCode
from cwpo.process import collect_garbage_rarely
from cwpo.types import ModelInfo
from cwpo_service.settings import ServeSettings
from cwpo_worker.commands import (
    MODEL_WAIT_SECONDS,
    DiscardShards,
    ModelWait,
    RetentionDays,
)

if TYPE_CHECKING:
    from cwpo_service.telemetry.traces import Traces


class Serve(ServeSettings, Command):
    """Serve an annotator over HTTP.

    Example: cwpo serve --annotator runs/demo/annotator --port 8000
    """

    def cli_cmd(self) -> None:
        """Serve until SIGTERM or Ctrl-C; accepted requests are answered first."""
        from cwpo_service.app import create_app
        from cwpo_service.scoring.loading import load_annotator
        from cwpo_service.server import Server, listen_all, ports_of
        from cwpo_service.telemetry import logs

        logs.configure(self.log_format, self.log_level)
        traces = _traces() if self.traces else None
        listeners = listen_all(self.host, self.port, self.health_port)
        settings = self.with_ports(ports_of(listeners))
        collect_garbage_rarely()
        app = create_app(settings, partial(load_annotator, settings), traces=traces)
        # A log in JSON must not contain a line of plain text.
        if self.backend != "null" and self.log_format == "text":
            print(f"cwpo serve: loading {self.annotator}", file=sys.stderr, flush=True)
        on_ready = partial(_announce, settings.url)
        Server(app, self.drain_seconds, on_ready=on_ready).serve_on(*listeners)
        if not app.state.service.is_idle:
            # Python would wait for a thread that still loads or scores, although nobody needs it.
            os._exit(ExitCode.DONE)


def _announce(url: str, model: ModelInfo) -> None:
    how = f"{model.backend} on {model.device} in {model.dtype}"
    print(f"cwpo serve: {model.name} is ready at {url} ({how})", flush=True)


def _traces() -> Traces:
    try:
        from cwpo_service.telemetry.traces import Traces

        return Traces.configured()
    except ImportError as error:
        raise ConfigError(
            "--traces needs OpenTelemetry's SDK: pip install 'cwpo-service[otel]'"
        ) from error


class Up(ServeSettings, Command):
    """Run the service, its workers and an embedded Valkey until Ctrl-C.

    Example: cwpo up --annotator runs/demo/annotator --workers 2
    """

    redis_url: SecretStr | None = Field(
        None,
        description="URL of the Redis or Valkey server of the job queue (rediss:// for TLS); by "
        "default, an embedded Valkey is started.",
    )
    store_url: str | None = Field(
        None,
        description="Folder or fsspec URL (such as s3://bucket/folder) of uploaded files and job "
        "results; by default, the folder `store` in --data-dir.",
    )
    workers: int = Field(
        2, ge=1, le=256, description="Number of worker processes, which work on batch jobs."
    )
    data_dir: Path = Field(
        Path("cwpo-data"),
        description="Folder of uploaded files, job results and the job queue; created if missing.",
    )
    model_wait: ModelWait = MODEL_WAIT_SECONDS
    retention_days: RetentionDays = None
    discard_shards: DiscardShards = False

    def cli_cmd(self) -> None:
        """Run all processes until SIGTERM or Ctrl-C, and restart those that crash."""
        from cwpo_service.supervisor import Supervisor

        Supervisor(
            self,
            workers=self.workers,
            data_dir=self.data_dir,
            model_wait=self.model_wait,
            retention_days=self.retention_days,
            discard_shards=self.discard_shards,
        ).run()
