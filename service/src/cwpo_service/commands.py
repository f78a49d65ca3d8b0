"""`cwpo serve` and `cwpo up`."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cwpo.errors import ConfigError
from cwpo.types import ModelInfo
from cwpo_service.settings import ServeSettings
from cwpo_worker.commands import RetentionDays

if TYPE_CHECKING:
    from cwpo_service.traces import Traces

_GC_THRESHOLDS = (50_000, 20, 100)


class Serve(ServeSettings):
    """Serve an annotator over HTTP.

    Example: cwpo serve --annotator runs/demo/annotator --port 8000
    """

    def cli_cmd(self) -> None:
        """Serve until SIGTERM or Ctrl-C; accepted requests are answered first."""
        from cwpo_service import logs
        from cwpo_service.app import create_app
        from cwpo_service.server import Server, listen_all

        logs.configure(self.log_format, self.log_level)
        traces = _traces() if self.traces else None
        listeners = listen_all(self)
        # Requests make many objects and no cycles: looking for some every 700 is wasted time.
        gc.set_threshold(*_GC_THRESHOLDS)
        app = create_app(self, self.load_annotator, traces=traces)
        Server(app, self, on_ready=self._announce).serve_on(*listeners)
        if not app.state.service.inference.is_idle:
            # Python would wait for a thread that still loads or scores, and nobody else does.
            os._exit(0)

    def _announce(self, model: ModelInfo) -> None:
        how = f"{model.backend} on {model.device} in {model.dtype}"
        print(f"cwpo serve: {model.name} is ready at {self.url} ({how})", flush=True)


def _traces() -> Traces:
    try:
        from cwpo_service.traces import Traces

        return Traces.configured()
    except ImportError as error:
        raise ConfigError(
            "--traces needs OpenTelemetry's SDK: pip install 'cwpo-service[otel]'"
        ) from error


class Up(ServeSettings):
    """Run the service, its workers and an embedded Valkey until Ctrl-C.

    Example: cwpo up --annotator runs/demo/annotator --workers 2
    """

    workers: int = Field(2, ge=1, le=256, description="worker processes")
    data_dir: Path = Field(
        Path("cwpo-data"), description="folder of uploads, results and the job queue"
    )

    retention_days: RetentionDays = None

    def cli_cmd(self) -> None:
        """Start all, watch over them, and stop them in order."""
        from cwpo_service.supervisor import Supervisor

        Supervisor(
            self,
            workers=self.workers,
            data_dir=self.data_dir,
            retention_days=self.retention_days,
        ).run()
