"""The exit codes of all commands are in one table."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("*/src/**/*.py"))
ENDINGS = {"exit", "_exit", "SystemExit"}
# Of a child between fork and exec, which has no command yet.
ALLOWED = {"client/src/cwpo/process.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_stands_as_a_number_where_a_process_ends(path):
    if str(path.relative_to(ROOT)) in ALLOWED:
        return
    tree = ast.parse(path.read_text())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        if name in ENDINGS:
            numbers = [
                node
                for argument in call.args
                for node in ast.walk(argument)
                if isinstance(node, ast.Constant) and type(node.value) is int
            ]
            assert not numbers, f"line {call.lineno}: give an ExitCode"
