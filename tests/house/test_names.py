"""One name for each module, and one module for each name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = sorted(path.parent for path in ROOT.glob("*/pyproject.toml"))
FOLDERS = [*DISTRIBUTIONS, *(ROOT / name for name in ("benchmarks", "docs", "examples", "tests"))]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda path: path.name)
def test_no_two_modules_of_a_distribution_have_one_name(distribution):
    places = defaultdict(list)
    for path in (distribution / "src").rglob("*.py"):
        if path.stem != "__init__":
            places[path.stem].append(str(path.relative_to(distribution)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_no_import_gives_a_name_of_ours_another(folder):
    paths = sorted(folder.rglob("*.py"))
    # Scripts import the modules beside them by their bare names.
    ours = {path.stem for path in paths if folder not in DISTRIBUTIONS}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name} as {alias}"
        for path in paths
        for line, name, alias in aliases(ast.parse(path.read_text()), ours)
    ]
    assert not found, "\n".join(found)


def aliases(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str, str]]:
    """What is imported of our packages and modules under another name than its own.

    Allowed where the module imports a name of another's that is the same.
    """

    def is_ours(module: str) -> bool:
        return module.startswith("cwpo") or module.split(".", maxsplit=1)[0] in ours

    imported = [
        (node.lineno, module_of(node) or item.name, item.name, item.asname)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for item in node.names
    ]
    foreign = {
        alias or name.split(".")[0] for _, module, name, alias in imported if not is_ours(module)
    }
    for line, module, name, alias in imported:
        if is_ours(module) and alias is not None and name not in foreign:
            yield line, name, alias


def module_of(node: ast.Import | ast.ImportFrom) -> str | None:
    """What names are imported from; one given relatively is ours."""
    if isinstance(node, ast.Import):
        return None
    return f"cwpo.{node.module}" if node.level else node.module
