"""API keys and their scopes."""

from __future__ import annotations

import base64
import hmac
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from cwpo.errors import ConfigError

Scope = Literal["annotate", "jobs", "admin"]

ADMIN: Scope = "admin"
_SCOPES: tuple[Scope, ...] = get_args(Scope)
_DEFAULT_SCOPES: frozenset[Scope] = frozenset({"annotate", "jobs"})
_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-f]{64})(:(?P<scopes>[a-z,]+))?"
)

_LOOK_SECONDS = 1.0

logger = logging.getLogger("cwpo_service")

# For the documentation only: FastAPI's own classes for these take more time than `authenticated`.
SECURITY_SCHEMES: dict[str, dict[str, Any]] = {
    "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "an API key"},
    "HTTPBasic": {
        "type": "http",
        "scheme": "basic",
        "description": "an API key as password, under any name",
    },
    "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


@dataclass(frozen=True)
class Key:
    """An API key, of which the service knows only the SHA-256.

    Args:
        digest: SHA-256 of the key, in hex.
        scopes: annotate allows labels and scores, jobs allows files and jobs, admin allows
            everything, including the jobs of other keys and a change of the model.
    """

    name: str
    digest: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Whether the key allows calls that need this scope."""
        return scope in self.scopes or ADMIN in self.scopes


@dataclass(frozen=True)
class Keyring:
    """All API keys, by name. Without keys, calls need no authentication."""

    keys: Mapping[str, Key]

    @classmethod
    def read(cls, path: Path | None) -> Keyring:
        """Read a file of lines `name:sha256hex` or `name:sha256hex:scope,scope`.

        A line without scopes gives annotate and jobs, or all scopes if the name is admin. Blank
        lines and # comments are skipped. A path of None gives no keys.
        Raises: ConfigError for a file that cannot be read or has no keys, or an invalid line.
        """
        if path is None:
            return cls({})
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys-file {path}: {error}") from error
        keys: dict[str, Key] = {}
        for number, text in enumerate(lines, 1):
            line = text.strip()
            if not line or line.startswith("#"):
                continue
            key = _key(line, f"{path}: line {number}")
            if key.name in keys:
                raise ConfigError(f"{path}: line {number}: the name {key.name} is already used")
            keys[key.name] = key
        if not keys:
            raise ConfigError(f"{path}: the file contains no key")
        return cls(keys)

    def find(self, secret: str) -> Key | None:
        """The key with this secret; None if no key has it."""
        digest = sha256(secret.encode()).hexdigest()
        found = None
        # Every digest is compared, so that the time taken reveals nothing about the keys.
        for key in self.keys.values():
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


class KeysFile:
    """The API keys in a file, which is read again when it has changed, at most once a second.

    If the changed file is not valid, the error is logged, and the previous keys stay in use.
    Args:
        path: the file; None for a service without keys.
    Raises: ConfigError as Keyring.read does.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._keyring = Keyring.read(path)
        self._version = _version(path)
        self._looked = time.monotonic()

    @property
    def keyring(self) -> Keyring:
        """The current keys."""
        now = time.monotonic()
        if self._path is not None and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            version = _version(self._path)
            if version != self._version:
                self._version = version
                self._read()
        return self._keyring

    def _read(self) -> None:
        try:
            self._keyring = Keyring.read(self._path)
        except ConfigError as error:
            logger.error("the previous API keys stay in use: %s", error)
        else:
            logger.warning("the API keys have changed: %d keys were read", len(self._keyring.keys))


def presented_secret(headers: Mapping[str, str]) -> str | None:
    """The API key in the headers of a request; None if they contain none.

    It is a bearer token, the value of X-API-Key, or the password of Basic authentication, for
    clients that accept nothing but a URL (http://any:KEY@host/get_reward).
    """
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials:
        return credentials
    if scheme.lower() == "basic":
        return _password(credentials)
    return headers.get("x-api-key")


def _password(credentials: str) -> str | None:
    try:
        _, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        return None
    return password or None


def _version(path: Path | None) -> tuple[int, ...]:
    """Values that differ if the file has changed; empty if the file cannot be read."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        found = None
    if found is None:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _key(line: str, place: str) -> Key:
    parts = _LINE.fullmatch(line)
    if parts is None:
        raise ConfigError(f"{place} is not name:sha256hex or name:sha256hex:scope,scope")
    name = parts["name"]
    if parts["scopes"] is None:
        default = frozenset(_SCOPES) if name == ADMIN else _DEFAULT_SCOPES
        return Key(name, parts["digest"], default)
    wanted = parts["scopes"].split(",")
    for scope in wanted:
        if scope not in _SCOPES:
            raise ConfigError(f"{place}: {scope!r} is not one of the scopes {', '.join(_SCOPES)}")
    return Key(name, parts["digest"], frozenset(s for s in _SCOPES if s in wanted))
