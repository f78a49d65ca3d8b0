"""The Dockerfile, read as text: no Docker engine is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FINAL = {"service": ["cwpo", "serve"], "worker": ["cwpo", "worker"], "trainer": ["cwpo"]}


@dataclass
class Stage:
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [value for name, value in self.instructions if name == keyword]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text())
    default = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        keyword, _, value = line.partition(" ")
        if keyword == "FROM":
            base, name = value.split(" AS ")
            found[name] = Stage(default.get(base, base))
        elif not found and keyword == "ARG":
            name, _, chosen = value.partition("=")
            default[f"${{{name}}}"] = chosen
        elif keyword:
            list(found.values())[-1].instructions.append((keyword, value.strip()))
    return found


def ancestry(stages: dict[str, Stage], name: str) -> Iterator[Stage]:
    while name in stages:
        yield stages[name]
        name = stages[name].base


def build_of(stages: dict[str, Stage], name: str) -> list[Stage]:
    sources = [re.match(r"--from=(\S+)", copy) for copy in stages[name].all("COPY")]
    (source,) = [match[1] for match in sources if match]
    return list(ancestry(stages, source))


def test_the_images_are_there_and_start_their_command(stages):
    for name, entrypoint in FINAL.items():
        assert [json.loads(value) for value in stages[name].all("ENTRYPOINT")] == [entrypoint]


def test_images_run_as_an_unprivileged_user(stages):
    for name in FINAL:
        (user,) = stages[name].all("USER")
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_final_images_get_a_finished_environment_and_build_nothing(stages):
    for name in FINAL:
        assert stages[name].base == "base"
        assert stages[name].all("RUN") == []
        assert len(stages[name].all("COPY")) == 1
    assert not any(re.search(r"apt-get|pip", run) for run in stages["base"].all("RUN"))


def test_worker_image_has_no_torch(stages):
    worker = build_of(stages, "worker")
    assert not any("TORCH" in value for stage in worker for _, value in stage.instructions)
    copied = {value.split()[0] for stage in worker for value in stage.all("COPY")}
    assert copied == {"locks", "client", "worker"}


def test_torch_can_be_chosen_and_is_pinned(stages):
    for name in ("service", "trainer"):
        arguments = [value for stage in build_of(stages, name) for value in stage.all("ARG")]
        assert any(re.fullmatch(r"TORCH=torch==[\d.]+", value) for value in arguments)


def test_bases_are_pinned_by_tag(stages):
    for stage in stages.values():
        assert stage.base in stages or re.fullmatch(r"python:3\.12-slim-\w+", stage.base)


def test_pip_uses_a_cache_mount(stages):
    runs = [run for stage in stages.values() for run in stage.all("RUN")]
    installs = [run for run in runs if "pip --python" in run]
    assert installs
    assert all(run.startswith("--mount=type=cache,target=") for run in installs)


def test_hub_telemetry_is_off(stages):
    assert any("HF_HUB_DISABLE_TELEMETRY=1" in value for value in stages["base"].all("ENV"))


def test_service_is_asked_whether_it_is_ready(stages):
    (check,) = stages["service"].all("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert "/health/ready" in command[-1]
    compile(command[-1], "HEALTHCHECK", "exec")


def test_a_worker_is_asked_for_a_sign_of_life(stages):
    (check,) = stages["worker"].all("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    (variable,) = stages["worker"].all("ENV")
    name, _, file = variable.partition("=")
    assert name in command[-1]
    # All that can be written in the container.
    assert file.startswith("/tmp/")
    compile(command[-1], "HEALTHCHECK", "exec")


def test_images_list_what_is_in_them(stages):
    for name in FINAL:
        runs = [run for stage in build_of(stages, name) for run in stage.all("RUN")]
        assert sum("/opt/cwpo/sbom.cdx.json" in run for run in runs) == 1


def test_images_are_labelled(stages):
    for name in FINAL:
        (label,) = stages[name].all("LABEL")
        for key in ("title", "description", "version", "licenses"):
            assert f"org.opencontainers.image.{key}=" in label


def test_the_build_context_holds_what_is_copied_and_no_more(stages):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        value.split()[0]
        for stage in stages.values()
        for value in stage.all("COPY")
        if not value.startswith("--from")
    }
    assert "*" in lines
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
