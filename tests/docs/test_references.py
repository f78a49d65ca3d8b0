"""What the docs name exists: files, modules, commands and their flags."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if (ROOT / name).is_file()
]
PAGES = [path for path in TRACKED if path.suffix == ".md"]
# Where modules and commands are named outside of the code.
PLACES = [
    path
    for path in TRACKED
    if path.suffix in {".md", ".yaml", ".toml", ".py", ".txt", ".tpl"} or path.name == "Dockerfile"
    if "templates" not in path.parts  # Helm's own names begin with the chart's.
    if path.relative_to(ROOT).parts[0] in {"deploy", "docs", "examples"}
    or path.suffix == ".md"
    or "recipes" in path.parts
]
PARTS = r"cwpo(?:_(?:annotator|worker|service|trainer))?"
NAME = re.compile(rf"(?<![\w./-]){PARTS}(?:\.\w+)+\b(?![\w/-])")
# Keys in the metadata of Arrow's columns and schemas.
NOT_IMPORTED = {"cwpo.type", "cwpo.certificate", "cwpo.provenance"}
COMMANDS = {point.name: point for point in entry_points(group="cwpo.commands")}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_every_relative_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_what_the_readme_explains_is_in_its_transcript():
    _, _, shown = (ROOT / "README.md").read_text().partition("## What the demo shows")
    _, transcript, meaning = shown.partition("## ")[0].split("```", 2)
    explained = re.findall(r"(?m)^- \*\*(.*?)\*\*", meaning)
    percentages = {float(found) for text in explained for found in re.findall(r"([\d.]+) %", text)}
    assert len(percentages) >= 5
    assert percentages <= {float(found) for found in re.findall(r"([\d.]+)%", transcript)}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


@pytest.mark.parametrize("path", PLACES, ids=short)
def test_every_dotted_name_can_be_imported(path):
    for name in sorted(set(NAME.findall(path.read_text())) - NOT_IMPORTED):
        assert found(name), name


def found(name: str) -> bool:
    """Whether it is a module, or what stands in one."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            here = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            fields = getattr(here, "model_fields", {})
            if not hasattr(here, word) and word not in fields:
                return False
            here = getattr(here, word, None)
        return True
    return False


@pytest.mark.parametrize("path", PLACES, ids=short)
def test_every_command_line_uses_flags_that_exist(path):
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(r"(?m)(?:^|[`$(]\s*|&& )((?:cwpo|torchrun) [a-z-]+[^`\n|&>]*)", text):
        words = line.split("#")[0].split()
        if words[0] == "torchrun":
            module = re.search(r"-m cwpo_trainer\.(\w+)(.*)", line)
            if module is None:
                continue
            command, words = module[1].replace("_", "-"), module[2].split()
        else:
            command, words = words[1], words[2:]
        if command in COMMANDS:
            flags = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(command)))
            missing = flags - known
            assert not missing, line


TESTS = {
    name
    for path in TRACKED
    if path.suffix == ".py" and path.name.startswith("test_")
    for name in re.findall(r"(?m)^(?:async )?def (test_\w+)", path.read_text())
}


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_every_test_that_is_named_exists(page):
    assert set(re.findall(r"`(test_\w+)`", page.read_text())) <= TESTS


@functools.cache
def help_of(command: str) -> str:
    """The help of a command and of all its subcommands."""
    fields = COMMANDS[command].load().model_fields
    subcommands = [
        field.alias or name for name, field in fields.items() if "SubCommand" in str(field.metadata)
    ]
    return "\n".join([printed(command), *(printed(command, name) for name in subcommands)])


def printed(command: str, *rest: str) -> str:
    from cwpo.cli import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run(COMMANDS[command].load(), [*rest, "--help"], f"cwpo {command}")
    assert out.getvalue()
    return out.getvalue()
