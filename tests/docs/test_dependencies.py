from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml"))


def names(requirements: list[str]) -> set[str]:
    found = {re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in requirements}
    return {name for name in found if not re.match(r"cwpo\b", name)}


@pytest.fixture(scope="module")
def sections() -> dict[str, set[str]]:
    """The packages in the first column of each section's table."""
    text = (ROOT / "docs/dependencies.md").read_text()
    found = {}
    for section in re.split(r"(?m)^## ", text)[1:]:
        title, _, body = section.partition("\n")
        cells = re.findall(r"(?m)^\| ([^|]+) \|", body)
        listed = {name.strip() for cell in cells for name in cell.split(",")}
        found[title.split()[0]] = listed - {"package", "what"}
    return found


@pytest.mark.parametrize("part", PARTS)
def test_every_dependency_of_a_part_is_explained(sections, part):
    project = tomllib.loads((ROOT / part / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"]) == sections[project["name"]]


def test_every_development_tool_is_explained(sections):
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = {name for name in sections["Development"] if "optional" not in name}
    assert names(workspace["dependency-groups"]["dev"]) == listed
