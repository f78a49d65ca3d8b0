"""API keys: who asks, and may they."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from fastapi import Depends, Request
from fastapi.params import Depends as DependsMarker

from cwpo.errors import ConfigError
from cwpo_service.problems import ProblemError

Scope = Literal["annotate", "jobs", "admin"]

ADMIN: Scope = "admin"
_SCOPES: tuple[Scope, ...] = get_args(Scope)
_DEFAULT_SCOPES: frozenset[Scope] = frozenset({"annotate", "jobs"})
_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-f]{64})(:(?P<scopes>[a-z,]+))?"
)

# For the documentation: FastAPI's own readers of the two cost more than all of `authenticated`.
SECURITY_SCHEMES: dict[str, dict[str, Any]] = {
    "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "an API key"},
    "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


@dataclass(frozen=True)
class Key:
    """An API key, without the key.

    Args:
        scopes: annotate for labels and scores, jobs for files and jobs, admin for everything,
            everybody's jobs and the change of the model included.
    """

    name: str
    digest: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Whether it opens calls of this scope."""
        return scope in self.scopes or ADMIN in self.scopes


@dataclass(frozen=True)
class Keyring:
    """Every key, by its name. An empty ring lets everyone in."""

    keys: Mapping[str, Key]

    @classmethod
    def read(cls, path: Path | None) -> Keyring:
        """The keys in a file of `name:sha256hex` or `name:sha256hex:scope,scope` lines.

        Without scopes a key has annotate and jobs, and the one named admin has all. Blank lines
        and # comments are skipped.
        Raises: ConfigError for a file that cannot be read, or a line that is no key.
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
                raise ConfigError(f"{path}: line {number} names {key.name} again")
            keys[key.name] = key
        if not keys:
            raise ConfigError(f"{path}: there is no key in the file")
        return cls(keys)

    def find(self, secret: str) -> Key | None:
        """The key, None for one that is not on the ring."""
        digest = sha256(secret.encode()).hexdigest()
        found = None
        # Every digest is compared, so that the time taken tells nothing about the ring.
        for key in self.keys.values():
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


async def authenticated(request: Request) -> Key | None:
    """The caller's key; None where the service has none.

    Raises: ProblemError, 401, for a wrong or missing key; 429 for one that asks too often.
    """
    keyring: Keyring = request.app.state.service.keyring
    if not keyring.keys:
        return None
    secret = _secret(request)
    key = keyring.find(secret) if secret else None
    if key is None:
        raise ProblemError(
            401,
            "the API key is missing or unknown: send it as `Authorization: Bearer KEY`",
            reason="unauthorized",
            headers={"WWW-Authenticate": "Bearer"},
        )
    request.state.key = key.name
    request.app.state.service.allowance.take(key.name)
    return key


def scoped(scope: Scope) -> DependsMarker:
    """A dependency of calls that need the scope. Raises: ProblemError, 403, for keys without."""

    async def check(request: Request) -> None:
        request.state.caller = key = await authenticated(request)
        if key is not None and not key.may(scope):
            raise ProblemError(
                403,
                f"the API key {key.name} has not the scope {scope} that this call needs",
                reason="forbidden",
            )

    marker: DependsMarker = Depends(check)
    return marker


async def _owner(request: Request) -> str | None:
    key: Key | None = request.state.caller
    return None if key is None or ADMIN in key.scopes else key.name


# Whose files and jobs the caller of a scoped call sees: its key's name, or None for everybody's.
Owner = Annotated[str | None, Depends(_owner)]


def _secret(request: Request) -> str | None:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials:
        return credentials
    return request.headers.get("x-api-key")


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
            raise ConfigError(f"{place}: {scope!r} is no scope; there are {', '.join(_SCOPES)}")
    return Key(name, parts["digest"], frozenset(s for s in _SCOPES if s in wanted))
