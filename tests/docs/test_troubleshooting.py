"""The messages that docs/troubleshooting.md quotes are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"(?m)^\| `([^`]+)` \|", PAGE.read_text())
GAP = "…"


def told(node: ast.expr) -> str:
    """A text of the code, with a gap for each of its values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(told(part) for part in node.values)
    return GAP


@pytest.fixture(scope="module")
def texts() -> set[str]:
    found = set()
    for path in ROOT.glob("*/src/**/*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        documenting = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        found |= {
            told(node)
            for node in nodes
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in documenting
        }
    return found


def test_the_page_has_messages():
    assert len(MESSAGES) > 50
    assert len(MESSAGES) == len(set(MESSAGES))


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_of_the_code(texts, message):
    parts = (re.escape(part) for part in message.strip(GAP).split(GAP))
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in texts)
