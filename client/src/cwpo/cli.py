"""The `cwpo` command: a subcommand is a settings class that an installed distribution offers.

Each distribution lists its commands under the entry point group `cwpo.commands`. A command is a
subclass of Command: its fields are the flags (`--like-this`), each with a CWPO_ environment twin;
what it does is `cli_cmd`.
"""

from __future__ import annotations

import inspect
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
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

GROUP = "cwpo.commands"


class ConfigFile(PydanticBaseSettingsSource):
    """Values from the YAML file that --config names; unknown keys are refused by the model."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Unused: a file is read as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The mapping in the file, none without --config."""
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config {path}: a mapping of setting: value is wanted")
        return {str(key).replace("-", "_"): value for key, value in values.items()}


class Command(BaseSettings):
    """Base of every subcommand. Flags win over --config, that over the environment."""

    model_config = SettingsConfigDict(
        env_prefix="CWPO_",
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
        """Show the docstring in --help as it stands in the code, less its indentation."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (put before these by CliApp), then --config, then the environment."""
        return init_settings, ConfigFile(settings_cls), env_settings

    def cli_cmd(self) -> None:
        """Do it; a command with subcommands runs the one that was named."""
        CliApp.run_subcommand(self)


def main() -> None:
    """Run `cwpo SUBCOMMAND ...`; every expected failure is one line on stderr and exit code 1."""
    arguments = sys.argv[1:]
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(commands))
        return
    name = arguments[0]
    if name not in commands:
        known = ", ".join(sorted(commands))
        sys.exit(f"cwpo: no command {name!r}; there are {known}")
    run(commands[name].load(), arguments[1:], f"cwpo {name}")


def run(command: type[Command], arguments: list[str], program: str) -> None:
    """Run one command with its arguments.

    Exits: 1 with one line for an expected failure, 2 for a wrong flag, 130 on Ctrl-C.
    """
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(command, cli_prog_name=program)
        CliApp.run(command, cli_args=arguments, cli_settings_source=source)
    except ValidationError as error:
        sys.exit("\n".join(f"{program}: {line}" for line in _flag_errors(error)))
    except (CwpoError, SettingsError) as error:
        sys.exit(f"{program}: {error}")
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _overview(commands: dict[str, EntryPoint]) -> str:
    lines = ["usage: cwpo COMMAND ... (cwpo COMMAND --help tells more)", ""]
    for name in sorted(commands):
        summary = (commands[name].load().__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<16} {summary}")
    return "\n".join(lines)


def _flag_errors(error: ValidationError) -> list[str]:
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
