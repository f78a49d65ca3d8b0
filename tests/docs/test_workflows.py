"""The workflows of GitHub, the hooks and the Makefile fit together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = ROOT / ".github" / "actions" / "setup" / "action.yml"
TARGETS = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))


@pytest.mark.parametrize("path", [*WORKFLOWS, ACTION], ids=lambda path: path.stem)
def test_every_target_that_a_workflow_makes_exists(path):
    text = path.read_text()
    assert yaml.safe_load(text)
    made = set(re.findall(r"run: make ([a-z-]+)", text))
    assert made
    assert made <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_reads_only_and_gives_way_to_the_next_push(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"\./.+|actions/[\w-]+@v\d+", action) for action in uses)


def test_every_target_is_listed_with_what_it_does():
    text = (ROOT / "Makefile").read_text()
    described = set(re.findall(r"(?m)^([a-z-]+):.*## \w", text))
    phony = set(re.search(r"(?m)^\.PHONY: (.*)", text)[1].split())
    assert TARGETS == described == phony


def test_the_hooks_run_programs_of_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        assert (ROOT / hook["entry"].split()[0]).is_file(), hook["entry"]
