"""`cwpo completion`: what a shell completes on Tab."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cwpo.cli import Command, whole_parser

# pydantic-settings names the values of a flag, and checks them itself.
_VALUES = re.compile(r"\{([^{}]+)\}")
# Some flags take a path or the id of a model or dataset of the Hub.
_TAKES_PATH = re.compile(r"\b(files?|folders?|path)\b", re.IGNORECASE)


class Completion(Command):
    """Print a script with which bash, zsh or fish completes commands, flags, values and files.

    It knows the commands of the distributions that are installed: write it anew after an update.

    Example:
        cwpo completion bash > ~/.local/share/bash-completion/completions/cwpo
    """

    shell: CliPositionalArg[Literal["bash", "zsh", "fish"]] = Field(
        description="Shell to write the script for."
    )

    def cli_cmd(self) -> None:
        """Print the script."""
        import shtab

        parser = whole_parser()
        for action in _actions(parser):
            values = _VALUES.fullmatch(str(action.metavar))
            if values is not None:
                action.choices = values[1].split(",")
            elif action.nargs != 0 and _TAKES_PATH.search(str(action.help)):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, self.shell))


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    """The flags and arguments of all subcommands."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for subparser in action.choices.values():
                yield from _actions(subparser)
        else:
            yield action
