"""What the site is built of: navigation, links, and the references of commands, Python and REST.

`make docs` builds it; a broken link or anchor, or a formula that cannot be shown, ends the build.
"""

from __future__ import annotations

import json
import os
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

from cwpo.cli import whole_parser

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "site"
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SITE / "sources.py"))


@pytest.fixture(scope="module")
def navigation(script):
    return list(script["pages_of"](script["navigation"]()))


@pytest.fixture(scope="module")
def sources(script):
    return script["sources"]()


def test_every_page_of_the_docs_is_in_the_navigation(navigation):
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(navigation) == set()
    assert len(navigation) == len(set(navigation))


def test_every_reference_is_in_the_navigation(script, navigation):
    for name in script["REFERENCES"]:
        pages = set(script["reference"](name))
        assert pages
        assert pages - set(navigation) == set()


def test_the_site_begins_with_what_a_newcomer_reads(navigation):
    assert navigation[:2] == ["README.md", "docs/README.md"]


def test_every_link_leads_to_a_file_of_the_site(sources):
    for path, content in sources.items():
        if path.endswith(".md") and not content.startswith(b"---\ntitle"):
            text = re.sub(r"(?ms)^( *)(```+).*?^\1\2$", "", content.decode())
            for link in LINK.findall(text):
                target = os.path.normpath(os.path.join(os.path.dirname(path), link))
                assert target in sources, f"{path}: {link}"


def test_a_linked_file_of_code_is_a_page_that_shows_it(sources):
    page = sources["client/src/cwpo/types.py.md"].decode()
    assert (ROOT / "client/src/cwpo/types.py").read_text() in page
    assert "](../client/src/cwpo/types.py.md)" in sources["docs/architecture.md"].decode()


def test_every_flag_of_every_command_is_on_its_page(sources):
    checked = 0
    for command in subparsers(whole_parser()):
        page = sources[f"commands/{command.prog.split()[-1]}.md"].decode()
        for parser in [command, *subparsers(command)]:
            section = page.partition(f"# {parser.prog}\n")[2].partition("\n## ")[0]
            for action in parser._actions:
                for flag in set(action.option_strings) - {"-h", "--help"}:
                    assert f"`{flag}`" in section, f"{parser.prog} {flag}"
                    checked += 1
    assert checked > 300


def subparsers(parser):
    found = (action.choices for action in parser._actions if hasattr(action.choices, "values"))
    return [subparser for choices in found for subparser in choices.values()]


def test_a_flag_is_told_with_its_values_and_default(sources):
    page = sources["commands/align.md"].decode()
    assert "| `--sharding` `none` `fsdp2` `zero3` | How GPUs hold the model" in page
    assert "| `--beta` `NUMBER` |" in page
    assert "(default: 0.5) |" in page


def test_every_public_name_of_python_is_on_its_page(sources):
    for package in ("cwpo", "cwpo_annotator", "cwpo_trainer"):
        page = sources[f"python/{package}.md"].decode()
        named = re.findall(r"(?m)^::: ([\w.]+)$", page)
        for name in import_module(package).__all__:
            defined = f"{package}.{name}" in named or "cwpo.errors" in named
            assert defined, f"{package}.{name}"


def test_every_call_and_every_body_of_the_contract_is_on_the_page_of_rest(sources):
    contract = json.loads((ROOT / "openapi" / "openapi.json").read_text())
    page = sources["rest/README.md"].decode()
    headings = set(re.findall(r"(?m)^### (.+)$", page))
    calls = {f"{how.upper()} {path}" for path, ways in contract["paths"].items() for how in ways}
    assert headings == calls | set(contract["components"]["schemas"])
    for schema in contract["components"]["schemas"].values():
        for field in schema.get("properties", {}):
            assert f"| `{field}`" in page
