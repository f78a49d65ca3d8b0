"""`cwpo up`: runs an embedded Valkey, the service and its workers; restarts crashed processes."""

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

import httpx2
from pydantic import SecretStr

from cwpo.errors import ConfigError, CwpoError
from cwpo.process import die_with_parent
from cwpo_annotator import checkpoint
from cwpo_service.access.keys import Keyring
from cwpo_service.server import listen_all, ports_of
from cwpo_service.settings import ServeSettings
from cwpo_worker.queue.valkey import EmbeddedValkey

_TICK_SECONDS = 0.1
_WORKER_STOP_SECONDS = 10.0
_SERVICE_GRACE_SECONDS = 10.0
_LONGEST_BACK_OFF = 30.0
_HEALTHY_SECONDS = 60.0


class Child:
    """A `cwpo` subcommand in its own process and session, which is restarted after a crash.

    Settings are passed in the environment, never in the arguments, since some are secrets.

    Args:
        name: name of the process in messages, such as "worker 1".
        subcommand: subcommand of `cwpo` to run.
        environment: environment variables to add to those of this process.
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
            # The supervisor itself prints that the service is ready.
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )
        self._started = time.monotonic()

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return None if self._process is None else self._process.poll()

    def watch(self) -> None:
        """Restart the process if it has ended; call this regularly.

        Each crash in a row doubles the delay before the restart, up to 30 s.
        """
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
        """Send SIGTERM to the process if it is running."""
        if self._process is not None and self.exit_code is None:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait this long for the process to stop; then kill it and all that it started."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class KeysWithWorkers:
    """A copy of the user's file of API keys, with the workers' key added.

    Args:
        source: the user's file.
        worker_key: the workers' key itself, not its hash.
        path: the copy, which is written at once.
    """

    def __init__(self, source: Path, worker_key: str, path: Path) -> None:
        self.path = path
        self._source = source
        self._line = f"cwpo-worker:{sha256(worker_key.encode()).hexdigest()}:annotate"
        self._text = ""
        self.refresh()

    def refresh(self) -> None:
        """Update the copy if the user's file has changed, unless the file cannot be read."""
        try:
            text = self._source.read_text()
        except OSError:
            return
        if text != self._text:
            self._text = text
            draft = self.path.with_suffix(".draft")
            draft.write_text(f"{text.rstrip()}\n{self._line}\n")
            draft.replace(self.path)


class Supervisor:
    """Starts Valkey, the service and its workers in order, restarts them, and stops them in order.

    Args:
        settings: settings of the service; the workers receive the URLs in them.
        workers: number of worker processes.
        data_dir: folder of the store and of the queue, if the settings have no URL for them.
        model_wait: seconds that a job waits for its annotator.
        retention_days: days after which the workers delete ended jobs; None keeps them.
        discard_shards: whether the workers remove the shards of jobs that have completed.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        workers: int,
        data_dir: Path,
        model_wait: float,
        retention_days: float | None = None,
        discard_shards: bool = False,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._data_dir = data_dir.resolve()
        self._model_wait = model_wait
        self._retention_days = retention_days
        self._discard_shards = discard_shards
        self._stopping = threading.Event()

    def run(self) -> None:
        """Run until SIGTERM or Ctrl-C.

        Raises: CwpoError, before any process is started, for an annotator that does not exist, an
            invalid file of API keys, a port in use, or a folder that is not writable; later, if
            the service exits before it is ready.
        """
        settings = self._checked()
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            valkey = None
            if settings.redis_url is None:
                valkey = stack.enter_context(EmbeddedValkey(self._data_dir / "valkey"))
                settings = settings.model_copy(update={"redis_url": SecretStr(valkey.url)})
            if settings.store_url is None:
                store_url = str(self._data_dir / "store")
                settings = settings.model_copy(update={"store_url": store_url})
            keys = key = None
            if settings.api_keys_file is not None:
                key = secrets.token_urlsafe(32)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cwpo-")))
                keys = KeysWithWorkers(settings.api_keys_file, key, folder / "keys")
                settings = settings.model_copy(update={"api_keys_file": keys.path})
            service = Child("the service", "serve", _environment(settings))
            environment = _worker_environment(
                settings, key, self._model_wait, self._retention_days, self._discard_shards
            )
            workers = [
                Child(f"worker {number}", "worker", environment)
                for number in range(1, self._workers + 1)
            ]
            stack.callback(self._stop, service, workers)
            service.start()
            if not self._wait_until_ready(service, settings.health_url):
                return
            for worker in workers:
                worker.start()
            print(self._ready_line(settings.url), flush=True)
            while not self._stopping.wait(_TICK_SECONDS):
                if valkey is not None and valkey.poll() is not None:
                    valkey.start()
                if keys is not None:
                    keys.refresh()
                for child in (service, *workers):
                    child.watch()

    def _checked(self) -> ServeSettings:
        """The settings with the actual ports, after checking everything that run may refuse."""
        settings = self._settings
        if settings.backend != "null" and settings.annotator is not None:
            checkpoint.resolve(settings.annotator)
        Keyring.read(settings.api_keys_file)
        listeners = listen_all(settings.host, settings.port, settings.health_port)
        settings = settings.with_ports(ports_of(listeners))
        for listener in listeners:
            listener.close()
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._data_dir):
                pass
        except OSError as error:
            raise ConfigError(
                f"--data-dir {self._data_dir}: cannot be written to ({error.strerror})"
            ) from error
        return settings

    def _wait_until_ready(self, service: Child, health_url: str) -> bool:
        """Wait for the service; returns whether it became ready before a signal arrived."""
        while not self._stopping.wait(_TICK_SECONDS):
            if service.exit_code is not None:
                raise CwpoError(
                    f"the service ended with exit code {service.exit_code} before it was ready"
                )
            try:
                if httpx2.get(f"{health_url}/health/ready", timeout=5.0).is_success:
                    return True
            except httpx2.TransportError:
                continue
        return False

    def _ready_line(self, url: str) -> str:
        settings = self._settings
        what = settings.annotator if settings.backend != "null" else "the null annotator"
        workers = "1 worker" if self._workers == 1 else f"{self._workers} workers"
        return (
            f"cwpo up: {what} is ready at {url} with {workers}; "
            f"data in {self._data_dir}; Ctrl-C stops all"
        )

    def _stop(self, service: Child, workers: list[Child]) -> None:
        """Stop the workers first, since they need the service to finish their work."""
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
    """The settings as environment variables, as `cwpo serve` reads them."""
    values = {name: getattr(settings, name) for name in ServeSettings.model_fields}
    return {
        f"CWPO_{name.upper()}": value.get_secret_value()
        if isinstance(value, SecretStr)
        else str(value)
        for name, value in values.items()
        if value is not None
    }


def _worker_environment(
    settings: ServeSettings,
    key: str | None,
    model_wait: float,
    retention_days: float | None,
    discard_shards: bool,
) -> dict[str, str]:
    redis_url = settings.redis_url.get_secret_value() if settings.redis_url else ""
    result = {
        "CWPO_URL": settings.url,
        "CWPO_REDIS_URL": redis_url,
        "CWPO_STORE_URL": settings.store_url or "",
        "CWPO_MODEL_WAIT": str(model_wait),
    }
    if key is not None:
        result["CWPO_API_KEY"] = key
    if retention_days is not None:
        result["CWPO_RETENTION_DAYS"] = str(retention_days)
    if discard_shards:
        result["CWPO_DISCARD_SHARDS"] = "true"
    return result
