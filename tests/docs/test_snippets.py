"""The commands of docs and help are valid, with the values of their flags, and the Python compiles.

test_walks.py runs those that need neither a GPU nor the Hub; the first five minutes of the README,
docs/trl.md and the demo are run as a whole by other tests.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

from cwpo.cli import run, whole_parser

ROOT = Path(__file__).parents[2]
LISTED = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
)
PAGES = [name for name in LISTED.stdout.splitlines() if "templates" not in name]
BLOCK = re.compile(r"(?ms)^```(\w+)\n(.*?)^```")
COMMANDS = {point.name: point for point in entry_points(group="cwpo.commands")}
# In place of what a reader would fill in.
LEFT_OUT = {"...", "…"}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """The pages and texts of the blocks of a language."""
    for page in PAGES:
        for found, text in BLOCK.findall((ROOT / page).read_text()):
            if found == language:
                yield page, text


def commands(script: str) -> Iterator[list[str]]:
    """The words of each cwpo command in a script, without `cwpo` or torchrun and its flags."""
    without_comments = re.sub(r"(?m)(^|\s)#.*$", "", script.replace("\\\n", " "))
    lost = re.search(r"(?m)^\s+--?[a-z].*", without_comments)
    if lost:
        raise ValueError(f"the line before {lost[0].strip()} lacks a backslash")
    words = shlex.shlex(without_comments, posix=True, punctuation_chars="();<>|&\n")
    words.whitespace = " \t"
    words.whitespace_split = True
    words.commenters = ""
    simple: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("();<>|&$\n"):
            simple.append([])
        else:
            simple[-1].append(word)
    for each in simple:
        while each and re.match(r"[A-Z_]+=", each[0]):
            del each[0]
        if each[:1] == ["cwpo"]:
            yield each[1:]
        elif each[:1] == ["torchrun"]:
            module = each[each.index("-m") + 1]
            rest = each[each.index("-m") + 2 :]
            yield [module.removeprefix("cwpo_trainer.").replace("_", "-"), *rest]


def examples(parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    """The examples in the help of a command and of its subcommands."""
    yield f"{parser.prog} --help", (parser.description or "").partition("Example:\n")[2]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from examples(subparser)


SHOWN = sorted(
    {
        (where, shlex.join(words))
        for where, text in (*blocks("sh"), *examples(whole_parser()))
        for words in commands(textwrap.dedent(text))
    }
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the reader is: with a clone's recipes, a file of settings, and an annotator."""
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    settings = "model: runs/sft\ndata: weighted.parquet\noutput: runs/cw-dpo\n"
    (tmp_path / "align.yaml").write_text(settings)
    (tmp_path / "runs" / "annotator").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def test_there_are_commands():
    assert len(SHOWN) > 100


@pytest.mark.parametrize(("page", "line"), SHOWN)
@pytest.mark.usefixtures("folder")
def test_every_command_is_one_that_can_be_given(page, line):
    name, *arguments = shlex.split(line)
    if "--help" in arguments:
        arguments.remove("--help")
    command = COMMANDS[name].load()
    given = []

    class Parsed(command):
        def cli_cmd(self) -> None:
            given.append(self)

    wrong = None
    try:
        run(Parsed, [each for each in arguments if each not in LEFT_OUT], f"cwpo {name}")
    except SystemExit as ending:
        wrong = str(ending)
    if LEFT_OUT & set(arguments):
        assert given or "is missing" in wrong, wrong
    else:
        assert given, wrong


@pytest.mark.parametrize(("page", "code"), list(blocks("python")))
def test_every_block_of_python_compiles_and_imports_what_there_is(page, code):
    compile(code, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            assert all(find_spec(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            public = getattr(module, "__all__", ())
            for alias in node.names:
                assert alias.name in public or hasattr(module, alias.name), alias.name
