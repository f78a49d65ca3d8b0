"""The Content-Digest header (RFC 9530), with the expected checksum of the body."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode

from fastapi import Request

from cwpo_service.problems import ProblemError

_SHA256 = re.compile(r"sha-256=:(?P<digest>[A-Za-z0-9+/]{43}=):")
_NO_DIGEST = "has no valid SHA-256: send it as sha-256=:BASE64:"


def expected_sha256(request: Request) -> str | None:
    """The SHA-256 in the request's Content-Digest, in hex; None without this header.

    Raises: ProblemError, 422 for a header without a valid SHA-256, or a compressed body, whose
        digest cannot be checked.
    """
    header = request.headers.get("content-digest")
    if header is None:
        return None
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise _invalid("applies to the file itself: send the file without Content-Encoding")
    members = [_SHA256.fullmatch(member.strip()) for member in header.split(",")]
    found = next((member for member in members if member), None)
    if found is None:
        raise _invalid(_NO_DIGEST)
    try:
        return b64decode(found["digest"], validate=True).hex()
    except binascii.Error as error:
        raise _invalid(_NO_DIGEST) from error


def _invalid(reason: str) -> ProblemError:
    return ProblemError(422, f"Content-Digest {reason}", reason="invalid")
