"""Writes the reference of the command, from the parsers of its subcommands.

It imports the five distributions as `cwpo --help` does, and neither torch nor TRL.
"""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, _SubParsersAction
from importlib.metadata import entry_points

from cwpo.cli import GROUP, HelpFormatter, whole_parser

FOLDER = "commands"


def pages() -> dict[str, str]:
    """A page for each command, and one that lists them."""
    parsers = {parser.prog.split()[-1]: parser for parser in subparsers(whole_parser())}
    rows = [
        f"| [`{parser.prog}`]({name}.md) | {told(summary(parser))} | {distribution(name)} |"
        for name, parser in parsers.items()
    ]
    overview = [
        "# All commands",
        "",
        "Written from the parsers of the commands; `cwpo COMMAND --help` prints the same. "
        "[The command](../docs/command.md) has what holds for all of them, such as exit codes, "
        "`--config` and environment variables.",
        "",
        "| command | what it does | distribution |",
        "|---|---|---|",
        *rows,
        "",
    ]
    found = {f"{FOLDER}/{name}.md": page(parser) for name, parser in parsers.items()}
    return {f"{FOLDER}/README.md": "\n".join(overview), **found}


def distribution(command: str) -> str:
    """The distribution that has the command."""
    (point,) = entry_points(group=GROUP, name=command)
    return point.dist.name if point.dist else ""


def page(parser: ArgumentParser) -> str:
    """The page of a command, with its subcommands."""
    parts = [f"# {parser.prog}", "", *section(parser)]
    for subparser in subparsers(parser):
        parts += [f"## {subparser.prog}", "", *section(subparser)]
    return "\n".join(parts)


def section(parser: ArgumentParser) -> list[str]:
    """What a command does, an example of it, and its arguments and flags."""
    text, _, examples = (parser.description or "").partition("\nExample:\n")
    lines = [told(text.strip()), ""]
    if examples:
        lines += ["```sh", re.sub(r"(?m)^    ", "", examples).strip("\n"), "```", ""]
    actions = [each for each in parser._actions if not isinstance(each, _SubParsersAction)]
    actions = [each for each in actions if each.dest != "help"]
    for title, kind in (
        ("argument", [each for each in actions if not each.option_strings]),
        ("flag", [each for each in actions if each.option_strings]),
    ):
        if kind:
            rows = [f"| {name(each)} | {meaning(each)} |" for each in kind]
            lines += [f"| {title} | meaning |", "|---|---|", *rows, ""]
    return lines


def name(action: Action) -> str:
    """A flag with its value, or an argument, as one writes it."""
    formatter = HelpFormatter("cwpo")
    default = formatter._get_default_metavar_for_optional(action)
    value = formatter._format_args(action, default)
    choices = re.fullmatch(r"\{([^{}]+)\}", value)
    value = " ".join(f"`{each}`" for each in choices[1].split(",")) if choices else f"`{value}`"
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return flags if action.nargs == 0 else f"{flags} {value}".strip()


def meaning(action: Action) -> str:
    """The help of a flag, with its default."""
    return told(HelpFormatter("cwpo")._expand_help(action))


def told(text: str) -> str:
    """A text of a terminal as Markdown: in cells, and with flags and placeholders as they are."""
    escaped = re.sub(r"(`[^`]*`)|([][*_<>\\$|])", lambda found: found[1] or f"\\{found[2]}", text)
    return re.sub(r"(?<![\w`-])(--[a-z][\w-]*)(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)", r"`\1`", escaped)


def summary(parser: ArgumentParser) -> str:
    """The first line of the description."""
    return (parser.description or "").strip().splitlines()[0]


def subparsers(parser: ArgumentParser) -> list[ArgumentParser]:
    """The parsers of its subcommands."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            return list(action.choices.values())
    return []
