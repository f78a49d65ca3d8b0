"""The ids of files, jobs and reviews."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from typing import Literal

Kind = Literal["file", "job", "review"]

_PATTERN = re.compile(r"(file|job|review)-[0-9a-f]{24}")


def make(kind: Kind, owner: str | None, idempotency_key: str | None) -> str:
    """An id such as `job-0123...`, of 24 hex digits: random, or the same for the same key."""
    if idempotency_key is None:
        return f"{kind}-{secrets.token_hex(12)}"
    named = json.dumps([kind, owner, idempotency_key]).encode()
    return f"{kind}-{hashlib.sha256(named).hexdigest()[:24]}"


def is_valid(kind: Kind, value: str) -> bool:
    """Whether `make` could have returned this id; check it before an id becomes part of a path."""
    return value.startswith(kind) and _PATTERN.fullmatch(value) is not None
