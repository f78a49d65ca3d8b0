"""API keys: who asks, and may they."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from cwpo.errors import ConfigError
from cwpo_service.problems import ProblemError

ADMIN = "admin"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-f]{64})")

_bearer = HTTPBearer(auto_error=False, description="an API key")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)


@dataclass(frozen=True)
class Keyring:
    """The SHA-256 of every key, by its name. An empty ring lets everyone in."""

    digests: Mapping[str, str]

    @classmethod
    def read(cls, path: Path | None) -> Keyring:
        """The keys in a file of `name:sha256hex` lines; blank lines and # comments are skipped.

        Raises: ConfigError for a file that cannot be read, or a line that is no key.
        """
        if path is None:
            return cls({})
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys-file {path}: {error}") from error
        digests: dict[str, str] = {}
        for number, text in enumerate(lines, 1):
            line = text.strip()
            if not line or line.startswith("#"):
                continue
            key = _LINE.fullmatch(line)
            if key is None:
                raise ConfigError(f"{path}: line {number} is not name:sha256hex")
            if key["name"] in digests:
                raise ConfigError(f"{path}: line {number} names {key['name']} again")
            digests[key["name"]] = key["digest"]
        if not digests:
            raise ConfigError(f"{path}: there is no key in the file")
        return cls(digests)

    def name(self, key: str) -> str | None:
        """The name of the key, None for one that is not on the ring."""
        digest = sha256(key.encode()).hexdigest()
        found = None
        # Every digest is compared, so that the time taken tells nothing about the ring.
        for name, known in self.digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


async def authenticated(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    header: Annotated[str | None, Security(_header)],
) -> str | None:
    """Whose files and jobs the caller sees: its key's name, or None for everybody's.

    None is also who calls with the key named admin, and whoever calls a service without keys.
    Raises: ProblemError, 401, for a wrong or missing key.
    """
    keyring: Keyring = request.app.state.service.keyring
    if not keyring.digests:
        return None
    key = bearer.credentials if bearer else header
    name = keyring.name(key) if key else None
    if name is None:
        raise ProblemError(
            401,
            "the API key is missing or unknown: send it as `Authorization: Bearer KEY`",
            reason="unauthorized",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return None if name == ADMIN else name


Owner = Annotated[str | None, Depends(authenticated)]
