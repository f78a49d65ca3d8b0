"""The `cwpo` command, whose subcommands come from the distributions that are installed.

Each distribution lists its commands under the entry point group `cwpo.commands`. A command is a
subclass of Command: its fields are the flags (`--like-this`), which can also be set as environment
variables (`CWPO_LIKE_THIS`), and its method `cli_cmd` does the work.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import sys
from argparse import Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import yaml
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cwpo.errors import ConfigError, CwpoError
from cwpo.exit_codes import ExitCode

GROUP = "cwpo.commands"

AsJson = Annotated[
    bool,
    Field(
        alias="json",
        description="Print the result as JSON for programs, alone on standard output; progress and "
        "errors stay on standard error.",
    ),
]

# Words for the values of flags, by the Python type that pydantic-settings names them after.
_VALUES = {
    "str": "TEXT",
    "SecretStr": "TEXT",
    "list[str]": "TEXT",
    "Path": "PATH",
    "list[Path]": "PATH",
    "int": "INT",
    "float": "NUMBER",
    "datetime": "TIME",
    "dict[str,JsonValue]": "NAME=VALUE",
    "dict[str,float]": "NAME=VALUE",
}
# The default of a flag that takes several values.
_LIST = re.compile(r"(?<=\(default: )\[('[\w-]+'(, )?)+\](?=\)$)")
# Of a flag that need not be given, and whose text says what happens without it.
_NO_DEFAULTS = (" (default: None)", " (default: )", " (default: [])", " (default: {})")


class HelpFormatter(RawDescriptionHelpFormatter):
    """Help for readers who do not know Python: types are words, and empty defaults are left out."""

    def _get_help_string(self, action: Action) -> str | None:
        told = action.help and _LIST.sub(lambda found: found[0][1:-1].replace("'", ""), action.help)
        for nothing in _NO_DEFAULTS:
            told = told and told.removesuffix(nothing)
        return told

    def _format_args(self, action: Action, default_metavar: str) -> str:
        if isinstance(action.metavar, str):
            action.metavar = _VALUES.get(action.metavar, action.metavar)
        return super()._format_args(action, default_metavar)


class Parser(ArgumentParser):
    """A parser whose errors are one line, as all others are, that tells where to look."""

    def __init__(self, prog: str | None = None, **how: Any) -> None:
        how.setdefault("formatter_class", HelpFormatter)
        super().__init__(prog, **{**how, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Exit with USAGE."""
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


class ConfigFile(PydanticBaseSettingsSource):
    """Values from the YAML file that --config names; the model refuses unknown keys.

    A file may say `extends: other.yaml` and give only what differs.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Unused: a file is read as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The settings in the file; none without --config."""
        path = self.current_state.get("config")
        if path is None:
            return {}
        return settings_in(Path(path), "--config")


def settings_in(path: Path, flag: str, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a YAML file, which override those of the file that its key `extends` names.

    The path in `extends` is relative to the folder of this file.

    Args:
        flag: the flag that names the file, for error messages.
        extending: the files that extend this one, directly or not.
    Raises: ConfigError for a file that holds no settings, or that extends itself.
    """
    if path.resolve() in extending:
        raise ConfigError(f"{flag} {path}: this file extends itself")
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{flag} {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{flag} {path}: the file is not a mapping of settings to values")
    settings = {str(key).replace("-", "_"): value for key, value in values.items()}
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise ConfigError(f"{flag} {path}: extends takes the path of one file, not {base!r}")
    return {**settings_in(path.parent / base, flag, (*extending, path.resolve())), **settings}


class Command(BaseSettings):
    """Base of every subcommand. Flags override --config, and that overrides the environment."""

    model_config = SettingsConfigDict(
        env_prefix="CWPO_",
        # Of --json too, which is an alias.
        env_prefix_target="all",
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_enforce_required=False,
        cli_shortcuts={"output": "o"},
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Show the docstring in --help as it is in the code, without its indentation.

        The first line of a subcommand's docstring describes it in the help of its parent.
        """
        super().__pydantic_init_subclass__(**kwargs)
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "")
        for field in cls.model_fields.values():
            for kind in get_args(field.annotation):
                if isinstance(kind, type) and issubclass(kind, Command):
                    field.description = _summary(kind)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (which CliApp puts first), then --config, then the environment."""
        return init_settings, ConfigFile(settings_cls), env_settings

    def cli_cmd(self) -> None:
        """Run the command; here, for a command with subcommands, the one that was named."""
        CliApp.run_subcommand(self)


@contextmanager
def _ending_with_its_reader() -> Iterator[None]:
    """Exit without a word if nobody reads the output any more, as in `cwpo --help | head -1`.

    Exits: UNREAD, which is what a shell says of a Unix tool that SIGPIPE ended.
    """
    try:
        try:
            yield
        finally:
            # What is still in the buffer, which Python would flush after the last `except`.
            print(end="", flush=True)
    except (BrokenPipeError, SystemExit) as ending:
        # rich catches the former, and raises the latter while it does.
        if not any(isinstance(error, BrokenPipeError) for error in (ending, ending.__context__)):
            raise
        # The buffer is not empty yet, and Python will try again.
        nobody = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nobody, stream.fileno())
        sys.exit(ExitCode.UNREAD)


@_ending_with_its_reader()
def main() -> None:
    """Run `cwpo SUBCOMMAND ...`; every expected failure is one line on stderr and FAILED."""
    arguments = sys.argv[1:]
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(commands))
        return
    name = arguments[0]
    if name not in commands:
        known = ", ".join(sorted(commands))
        sys.exit(f"cwpo: no command {name!r}; the commands are {known}")
    run(commands[name].load(), arguments[1:], f"cwpo {name}")


@_ending_with_its_reader()
def run(command: type[Command], arguments: list[str], program: str) -> None:
    """Run one command with its arguments.

    Exits: FAILED with one line for an expected failure, USAGE, INTERRUPTED on Ctrl-C, UNREAD
        if nobody reads the output.
    """
    try:
        parser = Parser(program, description=command.__doc__)
        source = _source(command, parser)
        arguments = _with_pairs_as_json(command, arguments)
        CliApp.run(command, cli_args=arguments, cli_settings_source=source)
    except ValidationError as error:
        sys.exit("\n".join(f"{program}: {line}" for line in flag_errors(error)))
    except (CwpoError, SettingsError) as error:
        sys.exit(f"{program}: {error}")
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not (where := _place_of(error)):
            raise
        sys.exit(f"{program}: {where}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def _source(command: type[Command], parser: ArgumentParser) -> CliSettingsSource[Any]:
    """What reads the flags of a command, which it adds to the parser."""
    return CliSettingsSource(command, root_parser=parser, formatter_class=HelpFormatter)


def _place_of(error: OSError) -> str | None:
    """What the system refused to read or write; None for what is no error of files."""
    if error.filename is not None and error.strerror is not None:
        return os.fsdecode(error.filename)
    return "writing failed" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None


def _with_pairs_as_json(command: type[Command], arguments: list[str]) -> list[str]:
    """The arguments, with NAME=VALUE of flags that hold a mapping as an object of JSON.

    pydantic-settings takes a comma in VALUE for the end of it, but reads objects as they are.
    Raises: ConfigError for a value without a name.
    """
    fields = command.model_fields.items()
    mappings = {f"--{name}" for name, field in fields if get_origin(field.annotation) is dict}
    done: list[str] = []
    for argument in arguments:
        flag, equals, pair = argument.partition("=")
        if flag in mappings and equals:
            done += [flag, _as_json(flag, pair)]
        elif done and done[-1] in mappings:
            done.append(_as_json(done[-1], argument))
        else:
            done.append(argument)
    return done


def _as_json(flag: str, pair: str) -> str:
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise ConfigError(f"{flag} {pair}: write NAME=VALUE")
    return json.dumps({name: value})


def whole_parser() -> ArgumentParser:
    """The parser of `cwpo` with all of its commands, for what reads parsers, such as completion."""
    parser = Parser("cwpo")
    commands = parser.add_subparsers()
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        command: type[Command] = point.load()
        subparser = commands.add_parser(
            point.name, help=_summary(command), description=command.__doc__
        )
        _source(command, subparser)
    return parser


def _overview(commands: dict[str, EntryPoint]) -> str:
    lines = [
        "usage: cwpo COMMAND ...",
        "",
        "commands (cwpo COMMAND --help shows the flags of one):",
        "",
    ]
    for name in sorted(commands):
        lines.append(f"  {name:<16} {_summary(commands[name].load())}")
    return "\n".join(lines)


def _summary(command: type[Command]) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


def flag_errors(error: ValidationError) -> list[str]:
    """What is wrong with the settings of a command, a line for each."""
    lines = []
    for item in error.errors(include_url=False):
        # A flag of `cwpo jobs list` is at ("list", "limit").
        *subcommands, name = [str(part).replace("_", "-") for part in item["loc"]] or [""]
        flag = " ".join([*subcommands, f"--{name}"])
        if item["type"] == "extra_forbidden":
            lines.append(f"no setting is called {item['loc'][-1]}")
        elif item["type"] == "missing":
            lines.append(f"{flag} is missing")
        elif item["type"] == "value_error":
            reason = str(item["ctx"]["error"])
            lines.append(f"{flag}: {reason}" if name else reason)
        else:
            lines.append(f"{flag}: {item['msg']}, not {item['input']!r}")
    return lines
