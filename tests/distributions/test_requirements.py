"""What a part imports, it requires."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Packages that come with another and move with it.
COMPANIONS = {"pydantic_core": "pydantic", "starlette": "fastapi"}
# Programs that import it run in an environment of its own, whose pins exclude those of the trainer.
ELSEWHERE = {"vllm"}
NOT_REQUIRED = {*sys.stdlib_module_names, *ELSEWHERE}
PARTS = sorted(path.parent for path in ROOT.glob("*/pyproject.toml"))


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(node: ast.AST) -> Iterator[str]:
    """Top-level names of the packages that are imported when the code below runs."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.module.partition(".")[0]
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


@pytest.mark.parametrize("part", PARTS, ids=lambda path: path.name)
def test_every_import_is_required(part):
    project = tomllib.loads((part / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {})
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    required = {normalised(re.match(r"[\w.-]+", line)[0]) for line in lines}
    providers = packages_distributions()
    missing = set()
    for path in part.rglob("src/**/*.py"):
        for name in set(imports(ast.parse(path.read_text()))) - NOT_REQUIRED:
            package = COMPANIONS.get(name, name)
            names = {normalised(provider) for provider in providers.get(package, [package])}
            if not names & {*required, project["name"]}:
                missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert not missing, "\n".join(sorted(missing))
