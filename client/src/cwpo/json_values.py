"""Counts the values in a JSON text without parsing it."""

from __future__ import annotations

import re

# A string, or a character that precedes a value. Possessive, so that a long string needs no memory
# for backtracking.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)


def exceeds(body: bytes, limit: int) -> bool:
    """Whether a JSON text contains more than `limit` values, including the names of fields.

    Parsed, a few bytes of JSON can take a hundred times as much memory, so this is checked first.
    Numbers, true, false and null are counted by the commas between them.
    """
    if len(body) <= limit:  # A value takes a byte or more.
        return False
    # A fast upper bound, which is enough for most texts.
    if body.count(b'"') // 2 + sum(map(body.count, (b"[", b"{", b","))) <= limit:
        return False
    return any(number > limit for number, _ in enumerate(_TOKEN.finditer(body), 1))
