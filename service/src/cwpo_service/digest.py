"""The Content-Digest header (RFC 9530): what the body's checksum has to be."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode

from fastapi import Request

from cwpo_service.problems import ProblemError

_SHA256 = re.compile(r"sha-256=:(?P<digest>[A-Za-z0-9+/]{43}=):")


def expected_sha256(request: Request) -> str | None:
    """The SHA-256 that the request gives for its body, in hex; None where it gives no digest.

    Raises: ProblemError, 422, for a digest that is none or cannot be checked.
    """
    header = request.headers.get("content-digest")
    if header is None:
        return None
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise _invalid("is checked on the file itself: send it without Content-Encoding")
    members = [_SHA256.fullmatch(member.strip()) for member in header.split(",")]
    found = next((member for member in members if member), None)
    if found is None:
        raise _invalid("has no SHA-256: sha-256=:BASE64: is wanted")
    try:
        return b64decode(found["digest"], validate=True).hex()
    except binascii.Error as error:
        raise _invalid("has no SHA-256: sha-256=:BASE64: is wanted") from error


def _invalid(reason: str) -> ProblemError:
    return ProblemError(422, f"Content-Digest {reason}", reason="invalid")
