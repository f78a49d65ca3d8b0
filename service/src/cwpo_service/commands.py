"""`cwpo serve` and `cwpo up`."""

from __future__ import annotations

import gc
from pathlib import Path

from pydantic import Field

from cwpo_service.settings import ServeSettings

_GC_THRESHOLDS = (50_000, 20, 100)


class Serve(ServeSettings):
    """Serve an annotator over HTTP.

    Example: cwpo serve --annotator runs/demo/annotator --port 8000
    """

    def cli_cmd(self) -> None:
        """Serve until SIGTERM or Ctrl-C; accepted requests are answered first."""
        from cwpo_service.app import create_app
        from cwpo_service.server import Server, listen

        listener = listen(self.host, self.port)
        # Requests make many objects and no cycles: looking for some every 700 is wasted time.
        gc.set_threshold(*_GC_THRESHOLDS)
        Server(create_app(self, self.load_annotator), self).serve_on(listener)


class Up(ServeSettings):
    """Run the service, its workers and an embedded Valkey until Ctrl-C.

    Example: cwpo up --annotator runs/demo/annotator --workers 2
    """

    workers: int = Field(2, ge=1, le=256, description="worker processes")
    data_dir: Path = Field(
        Path("cwpo-data"), description="folder of uploads, results and the job queue"
    )

    def cli_cmd(self) -> None:
        """Start all, watch over them, and stop them in order."""
        from cwpo_service.supervisor import Supervisor

        Supervisor(self, workers=self.workers, data_dir=self.data_dir).run()
