"""`cwpo up`: an embedded Valkey, the service and its workers under one roof."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import httpx
from pydantic import SecretStr

from cwpo.errors import ConfigError, CwpoError
from cwpo.process import die_with_parent
from cwpo_annotator import checkpoint
from cwpo_service.auth import Keyring
from cwpo_service.server import listen
from cwpo_service.settings import ServeSettings
from cwpo_worker.valkey import EmbeddedValkey

_TICK_SECONDS = 0.1
_WORKER_STOP_SECONDS = 10.0
_SERVICE_GRACE_SECONDS = 10.0
_LONGEST_BACK_OFF = 30.0
_HEALTHY_SECONDS = 60.0


class Child:
    """A `cwpo` subcommand in a process and session of its own, started again when it crashes.

    Settings go by the environment, never by argv: some of them are secrets.
    """

    def __init__(self, name: str, subcommand: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._arguments = [sys.executable, "-m", "cwpo", subcommand]
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._restart_at = 0.0
        self._crashes = 0

    def start(self) -> None:
        """Start the process."""
        self._process = subprocess.Popen(  # noqa: S603
            self._arguments,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            # What it has to say besides errors is said by the supervisor.
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )
        self._started = time.monotonic()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def watch(self) -> None:
        """Start it again if it has ended: at once the first time, then later and later."""
        if self.exit_code is None:
            return
        now = time.monotonic()
        if not self._restart_at:
            self._crashes = 0 if now - self._started > _HEALTHY_SECONDS else self._crashes + 1
            delay = min(0.25 * 2.0**self._crashes, _LONGEST_BACK_OFF)
            self._restart_at = now + delay
            print(
                f"cwpo up: {self.name} ended with exit code {self.exit_code}; "
                f"starting it again in {delay:.1f} s",
                file=sys.stderr,
            )
        elif now >= self._restart_at:
            self._restart_at = 0.0
            self.start()

    def terminate(self) -> None:
        """Ask it to stop."""
        if self._process is not None and self.exit_code is None:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Give it so long to stop, then kill it with all that it started."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Supervisor:
    """Starts everything in order, watches over it, and stops it in order."""

    def __init__(
        self,
        settings: ServeSettings,
        *,
        workers: int,
        data_dir: Path,
        retention_days: float | None = None,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._data_dir = data_dir.resolve()
        self._retention_days = retention_days
        self._stopping = threading.Event()

    def run(self) -> None:
        """Run until SIGTERM or Ctrl-C.

        Raises: CwpoError, before anything is started, for an annotator, port or folder that will
            not do; later, when the service ends before it was ever ready.
        """
        settings = self._checked()
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            valkey = None
            if settings.redis_url is None:
                valkey = stack.enter_context(EmbeddedValkey(self._data_dir / "valkey"))
                settings.redis_url = SecretStr(valkey.url)
            if settings.store_url is None:
                settings.store_url = str(self._data_dir / "store")
            key = self._admit_workers(settings, stack)
            service = Child("the service", "serve", _environment(settings))
            environment = _worker_environment(settings, key, self._retention_days)
            workers = [
                Child(f"worker {number}", "worker", environment)
                for number in range(1, self._workers + 1)
            ]
            stack.callback(self._stop, service, workers)
            service.start()
            if not self._wait_until_ready(service):
                return
            for worker in workers:
                worker.start()
            print(self._ready_line(), flush=True)
            while not self._stopping.wait(_TICK_SECONDS):
                if valkey is not None and valkey.poll() is not None:
                    valkey.start()
                for child in (service, *workers):
                    child.watch()

    def _checked(self) -> ServeSettings:
        """The settings with the port that will be used, if all can be had."""
        settings = self._settings
        if settings.backend != "null" and settings.annotator is not None:
            checkpoint.resolve(settings.annotator)
        Keyring.read(settings.api_keys_file)
        with listen(settings.host, settings.port) as listener:
            settings.port = listener.getsockname()[1]
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._data_dir):
                pass
        except OSError as error:
            raise ConfigError(
                f"--data-dir {self._data_dir}: cannot be written to ({error.strerror})"
            ) from error
        return settings

    def _admit_workers(self, settings: ServeSettings, stack: ExitStack) -> str | None:
        """Where the service asks for keys, add one of the workers' own to those it knows."""
        if settings.api_keys_file is None:
            return None
        key = secrets.token_urlsafe(32)
        known = settings.api_keys_file.read_text()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cwpo-"))
        settings.api_keys_file = Path(folder) / "keys"
        line = f"cwpo-worker:{sha256(key.encode()).hexdigest()}:annotate"
        settings.api_keys_file.write_text(f"{known.rstrip()}\n{line}\n")
        return key

    def _wait_until_ready(self, service: Child) -> bool:
        """Whether the service became ready before a signal came."""
        while not self._stopping.wait(_TICK_SECONDS):
            if service.exit_code is not None:
                raise CwpoError(
                    f"the service ended with exit code {service.exit_code} before it was ready"
                )
            try:
                if httpx.get(f"{self._settings.url}/health/ready", timeout=5.0).is_success:
                    return True
            except httpx.TransportError:
                continue
        return False

    def _ready_line(self) -> str:
        settings = self._settings
        what = settings.annotator if settings.backend != "null" else "the null annotator"
        workers = "1 worker" if self._workers == 1 else f"{self._workers} workers"
        return (
            f"cwpo up: {what} is ready at {settings.url} with {workers}; "
            f"data in {self._data_dir}; Ctrl-C stops all"
        )

    def _stop(self, service: Child, workers: list[Child]) -> None:
        """Workers first: they need the service for what they are at."""
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + _WORKER_STOP_SECONDS
        for worker in workers:
            worker.wait(max(deadline - time.monotonic(), 0.0))
        service.terminate()
        service.wait(self._settings.drain_seconds + _SERVICE_GRACE_SECONDS)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {
            number: signal.signal(number, lambda *_: self._stopping.set()) for number in numbers
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _environment(settings: ServeSettings) -> dict[str, str]:
    """Every setting as the environment variable that it is read from."""
    values = {name: getattr(settings, name) for name in ServeSettings.model_fields}
    return {
        f"CWPO_{name.upper()}": value.get_secret_value()
        if isinstance(value, SecretStr)
        else str(value)
        for name, value in values.items()
        if value is not None
    }


def _worker_environment(
    settings: ServeSettings, key: str | None, retention_days: float | None
) -> dict[str, str]:
    redis_url = settings.redis_url.get_secret_value() if settings.redis_url else ""
    result = {
        "CWPO_URL": settings.url,
        "CWPO_REDIS_URL": redis_url,
        "CWPO_STORE_URL": settings.store_url or "",
    }
    if key is not None:
        result["CWPO_API_KEY"] = key
    if retention_days is not None:
        result["CWPO_RETENTION_DAYS"] = str(retention_days)
    return result
