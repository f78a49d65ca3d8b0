"""The client's check of `cwpo doctor`: the installation, the disk, the service and its clock."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import httpx2
from packaging.requirements import Requirement
from pydantic import ValidationError

from cwpo import transport
from cwpo.errors import APIError, UnauthorizedError, first_line
from cwpo.findings import Finding, Level, Places
from cwpo.types import ModelInfo

DISTRIBUTIONS = ("cwpo", "cwpo-annotator", "cwpo-worker", "cwpo-service", "cwpo-trainer")
# A clock that is further off than this is not kept by anything; S3 refuses the latter.
CLOCK_SECONDS = 5.0
CLOCK_LIMIT_SECONDS = 900.0
FREE_BYTES = 1 << 30
_ANSWER_SECONDS = 10.0


def client(places: Places) -> Iterator[Finding]:
    """The installation, the disk, the service and its clock."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield from installation()
    yield from disk("temporary files", Path(tempfile.gettempdir()), FREE_BYTES, "TMPDIR")
    yield from service(places)


def installation() -> Iterator[Finding]:
    """Whether the distributions are of one version, and have what they require."""
    installed = {name: found for name in DISTRIBUTIONS if (found := _version(name)) is not None}
    told = ", ".join(f"{name} {found}" for name, found in installed.items())
    if len(set(installed.values())) > 1:
        newest = max(installed.values(), key=lambda found: tuple(map(_number, found.split("."))))
        wanted = " ".join(f"'{name}=={newest}'" for name in installed)
        yield Finding("wrong", "versions", f"they differ: {told}", f"pip install {wanted}")
    else:
        yield Finding("ok", "versions", told)
    for name in installed:
        for line in requires(name) or ():
            yield from _unmet(name, Requirement(line))


def disk(what: str, folder: Path, least: int, setting: str) -> Iterator[Finding]:
    """Whether there is room for something.

    Args:
        least: bytes that should be free.
        setting: the environment variable that names the folder.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    said = f"{free / 1e9:,.1f} GB are free for {what} in {folder}"
    if free < least:
        fix = (
            f"delete files there, or name a folder with more than {least / 1e9:,.0f} GB: {setting}"
        )
        yield Finding("warning", "disk", said, fix)
    else:
        yield Finding("ok", "disk", said)


def service(places: Places) -> Iterator[Finding]:
    """Whether the service is there, ready, and takes the API key; how far its clock is off."""
    headers = transport.headers(places.api_key)
    try:
        with httpx2.Client(base_url=places.url, headers=headers, timeout=_ANSWER_SECONDS) as http:
            model = http.get("/model")
            now = datetime.now(UTC)
            ready = http.get("/health/ready")
            jobs = http.get("/health/ready", params={"for": "jobs"})
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        level: Level = "wrong" if places.is_url_given else "skipped"
        said = f"no answer from {places.url} ({first_line(error)})"
        yield Finding(level, "service", said, "start one with `cwpo up`, or set --url or CWPO_URL")
        return
    yield from _annotator(places.url, model)
    yield from _readiness(ready, jobs)
    if "date" in model.headers:
        there = parsedate_to_datetime(model.headers["date"])
        yield clock("the service", (now - there).total_seconds())


def clock(whose: str, seconds: float) -> Finding:
    """How far the clock of another machine is behind this one's."""
    off = abs(seconds)
    if off <= CLOCK_SECONDS:
        return Finding("ok", "clock", f"that of {whose} agrees with this one")
    said = f"that of {whose} is {off:,.0f} s {'behind' if seconds > 0 else 'ahead of'} this one"
    level: Level = "wrong" if off >= CLOCK_LIMIT_SECONDS else "warning"
    fix = "set both by NTP (`timedatectl set-ntp true`): an object store refuses what is 15 min off"
    return Finding(level, "clock", said, fix)


def _annotator(url: str, answer: httpx2.Response) -> Iterator[Finding]:
    """What the service hosts, where it says so."""
    if answer.is_success:
        try:
            model = ModelInfo.model_validate_json(answer.content)
        except ValidationError:
            fix = "set --url or CWPO_URL to the address of a cwpo service"
            yield Finding("wrong", "service", f"{url} is no cwpo service of this version", fix)
            return
        how = f"{model.backend} on {model.device} in {model.dtype}"
        said = f"{url} hosts {model.name}, revision {model.revision} ({how})"
        yield Finding("ok", "service", said)
        return
    error = transport.error_of(answer)
    if isinstance(error, UnauthorizedError):
        said = f"{url} does not accept the API key: {error.problem.detail}"
        yield Finding("wrong", "service", said, "set CWPO_API_KEY to a key that it knows")
    elif answer.status_code == HTTPStatus.NOT_FOUND:
        fix = "set --url or CWPO_URL to the address of a cwpo service"
        yield Finding("wrong", "service", f"{url} answers, but is no cwpo service", fix)
    else:
        yield Finding("wrong", "service", f"{url}: {_told(error)}", "see its log")


def _readiness(ready: httpx2.Response, jobs: httpx2.Response) -> Iterator[Finding]:
    """Whether it takes work; a service whose probes have another port does not tell here."""
    if ready.is_success:
        yield Finding("ok", "service", "it is ready to annotate")
    elif ready.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        said = f"it is not ready: {_told(transport.error_of(ready))}"
        yield Finding("wrong", "service", said, "wait until it has loaded, or see its log")
    if jobs.is_success:
        yield Finding("ok", "jobs", "the service takes them, and a worker is there")
    elif jobs.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        error = transport.error_of(jobs)
        if error.reason == "no_jobs":
            yield Finding("skipped", "jobs", error.problem.detail)
        elif ready.is_success:
            fix = "start a worker with `cwpo worker`, and look at Redis and the store"
            yield Finding("wrong", "jobs", _told(error), fix)


def _told(error: APIError) -> str:
    return f"{error.problem.status} {error.problem.title}: {error.problem.detail}"


def _unmet(name: str, requirement: Requirement) -> Iterator[Finding]:
    """A requirement that is missing or of another version."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return
    found = _version(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return
    there = "it is not installed" if found is None else f"{found} is installed"
    wanted = f"{requirement.name}{requirement.specifier}"
    yield Finding(
        "wrong", "versions", f"{name} needs {wanted}, and {there}", f"pip install '{wanted}'"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _number(part: str) -> int:
    return int(part) if part.isdecimal() else 0
