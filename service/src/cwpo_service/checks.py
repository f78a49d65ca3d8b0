"""The service's check of `cwpo doctor`: how many connections the system lets it have."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from cwpo.findings import Finding, Places

# A default of Linux. Each connection is an open file, and so are those of Redis and the store.
FEWEST_FILES = 1024


def service(places: Places) -> Iterator[Finding]:
    """The limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield open_files(soft, hard)


def open_files(soft: int, hard: int) -> Finding:
    """What the limits of this process are enough for."""
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", "files", "any number may be open")
    if soft >= FEWEST_FILES:
        return Finding("ok", "files", f"{soft:,} may be open, one for each connection")
    is_raisable = hard == resource.RLIM_INFINITY or hard >= FEWEST_FILES
    fix = f"`ulimit -n {65536 if hard == resource.RLIM_INFINITY else hard}`"
    if not is_raisable:
        fix = "raise nofile in /etc/security/limits.conf, or LimitNOFILE of the unit"
    said = f"only {soft:,} may be open, one for each connection"
    return Finding("warning", "files", said, f"{fix} before `cwpo serve`")
