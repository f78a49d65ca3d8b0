r"""Formulas of Markdown as MathML, which browsers show without a script: `$…$` and `$$…$$`.

An extension of Python-Markdown. `\_` is `_`, since GitHub needs it so.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.inlinepatterns import InlineProcessor

INLINE = r"(?<![\\$\w])\$(?![\s$])((?:\\.|[^$\\])+?)(?<!\s)\$(?![\w$])"
DISPLAYED = re.compile(r"(?s)\A\s*\$\$(.+)\$\$\s*\Z")
TAG = re.compile(r"\\tag\{([^}]*)\}")
# Named operators that the converter does not know.
NAMED = re.compile(r"\\arg\\(min|max)")


def mathml(formula: str, display: str) -> str:
    """A formula of LaTeX as an element of HTML.

    Raises: ValueError for a command of LaTeX that the converter does not know.
    """
    known = NAMED.sub(r"\\operatorname{arg\1}", formula.replace(r"\_", "_"))
    found: str = convert(known, display=display)
    unknown = re.findall(r"\\[A-Za-z]+", found)
    if unknown:
        raise ValueError(f"the formula {formula} has {unknown[0]}, which cannot be shown")
    return found


class Inline(InlineProcessor):
    """`$…$` in a text."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        """What stands for the formula until Markdown is done, and where it is."""
        return self.md.htmlStash.store(mathml(m[1], "inline")), m.start(0), m.end(0)


class Displayed(BlockProcessor):
    r"""`$$…$$` that is a paragraph of its own, with the number that `\tag` gives it."""

    def __init__(self, md: Markdown) -> None:
        super().__init__(md.parser)
        self.stash = md.htmlStash

    def test(self, parent: Element, block: str) -> bool:
        """Whether the paragraph is a formula."""
        return DISPLAYED.match(block) is not None

    def run(self, parent: Element, blocks: list[str]) -> None:
        """Take the formula from the paragraphs."""
        formula = DISPLAYED.sub(r"\1", blocks.pop(0))
        number = TAG.search(formula)
        shown = mathml(TAG.sub("", formula), "block")
        told = f'<span class="formula-number">({number[1]})</span>' if number else ""
        html = f'<div class="formula">{shown}{told}</div>'
        SubElement(parent, "p").text = self.stash.store(html)


class Formulas(Extension):
    """The extension."""

    def extendMarkdown(self, md: Markdown) -> None:
        r"""Read formulas after code, and before what Markdown means by `_`, `*` and `\`."""
        md.inlinePatterns.register(Inline(INLINE, md), "formula", 185)
        md.parser.blockprocessors.register(Displayed(md), "formula", 175)


def makeExtension(**options: Any) -> Formulas:
    """What Python-Markdown calls."""
    return Formulas(**options)
