"""What `cwpo doctor` finds, by the checks of all distributions that are installed.

Each distribution lists its check under the entry point group `cwpo.checks`: a function of Places
that gives Findings. A check only looks: it changes nothing that is not its own probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

from cwpo.errors import first_line

GROUP = "cwpo.checks"

Level = Literal["ok", "skipped", "warning", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    level: "warning" for what works and may not for long, "skipped" for what was not named.
    subject: what was looked at, in one word.
    said: what was found, in one line.
    fix: what to do about it; None where there is nothing to do.
    """

    level: Level
    subject: str
    said: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look.

    url: address of the service.
    is_url_given: whether it was named, so that somebody expects a service there.
    redis_url, store_url: as `cwpo worker` takes them; None if they are not named.
    """

    url: str
    is_url_given: bool = True
    api_key: str | None = None
    redis_url: str | None = None
    store_url: str | None = None


Check = Callable[[Places], Iterable[Finding]]


def findings(places: Places) -> Iterator[Finding]:
    """What all checks find, one after the other; a check that fails is a finding too."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            check: Check = point.load()
            yield from check(places)
        except Exception as error:
            module = point.value.partition(":")[0]
            said = f"{module} cannot look: {type(error).__name__}: {first_line(error)}"
            yield Finding("wrong", point.name, said, f"install it anew: pip install {point.name}")
