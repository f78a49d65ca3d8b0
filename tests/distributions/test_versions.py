"""One version is released at a time, and everything that names it agrees."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PARTS = [tomllib.loads(path.read_text())["project"] for path in ROOT.glob("*/pyproject.toml")]
VERSION = PARTS[0]["version"]


def test_the_parts_have_one_version_and_require_each_other_at_it():
    assert {part["version"] for part in PARTS} == {VERSION}
    major, minor, _ = VERSION.split(".")
    wanted = f">={major}.{minor},<{major}.{int(minor) + 1}"
    for part in PARTS:
        for line in part["dependencies"]:
            if line.startswith("cwpo"):
                assert re.sub(r"^[\w-]+", "", line) == wanted, line


def test_images_chart_contract_and_changelog_name_it():
    chart = yaml.safe_load((ROOT / "deploy/helm/cwpo/Chart.yaml").read_text())
    assert chart["version"] == str(chart["appVersion"]) == VERSION
    assert json.loads((ROOT / "openapi/openapi.json").read_text())["info"]["version"] == VERSION
    assert f"\n## [{VERSION}] - " in (ROOT / "CHANGELOG.md").read_text()
    files = [*(ROOT / "deploy").rglob("*.yaml"), ROOT / "Dockerfile", ROOT / "docs/deployment.md"]
    for path in files:
        text = path.read_text()
        images = re.findall(r"cwpo-(?:service|worker|trainer):(?:\$\{\w+:-)?(\d[\d.]+)", text)
        assert {*images, *re.findall(r"ARG VERSION=(\S+)", text)} <= {VERSION}, path
