"""A step: one of our commands with its settings, known by what goes into it.

The name of a step's output has a hash of the command, its settings and the steps that made its
inputs. So two rows, of one recipe or of two, that need the same thing share it, and nothing made
with other settings is ever taken for it. Files of the user's are known by their content, so that
results are the same ones wherever these lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cwpo.commands.annotate import Annotate
from cwpo.errors import ConfigError
from cwpo_trainer.settings.annotator_training import AnnotatorTraining
from cwpo_trainer.settings.data_preparation import Drawing, Mixing, Poisoning, Splitting
from cwpo_trainer.settings.evaluation import AnnotatorEvaluation, PolicyEvaluation
from cwpo_trainer.settings.online_alignment import OnlineAlignment
from cwpo_trainer.settings.policy_training import Alignment, FineTuning
from cwpo_trainer.settings.unused_flags import flag


@dataclass(frozen=True)
class Kind:
    """A command that steps may be of.

    settings: what reads its flags; positional: the arguments that are no flags, in order.
    module: what torchrun runs, of a command that several GPUs can share.
    resumes: has --resume.
    """

    settings: type[BaseModel]
    positional: tuple[str, ...] = ()
    module: str | None = None
    resumes: bool = False


KINDS: Mapping[str, Kind] = {
    "data split": Kind(Splitting, ("data",)),
    "data poison": Kind(Poisoning, ("data",)),
    "data mix": Kind(Mixing),
    "data draw": Kind(Drawing, ("data",)),
    "train-annotator": Kind(AnnotatorTraining, module="cwpo_trainer.train_annotator", resumes=True),
    "annotate": Kind(Annotate, ("input",)),
    "sft": Kind(FineTuning, module="cwpo_trainer.sft", resumes=True),
    "align": Kind(Alignment, module="cwpo_trainer.align", resumes=True),
    "online": Kind(OnlineAlignment, module="cwpo_trainer.online", resumes=True),
    "evaluate annotator": Kind(AnnotatorEvaluation, ("annotator",)),
    "evaluate policy": Kind(PolicyEvaluation, ("policy",)),
}
# Where a service listens that a step needs, in commands that are shown; free ports are used to run.
SHOWN_PORT = 8000
# Settings that change nothing of what a step makes.
_NO_EFFECT = {"threads", "save_steps", "job_above", "reference_cache"}


class LocalPath(str):
    """A file of the user's, or a folder with a model, which is known by its content."""

    __slots__ = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the file, or of the model's weights: the rest varies with who saved it.

        The path itself where nothing is there, as when recipes are only listed.
        """
        return _digest(str(self))


@dataclass(frozen=True)
class Output:
    """What a step makes, or a file in the folder that it makes."""

    step: Step
    file: str = ""

    def __truediv__(self, file: str) -> Output:
        return Output(self.step, file)


@dataclass(frozen=True)
class SharedFolder:
    """A folder beside the outputs, in which steps find what others have kept there."""

    name: str


@dataclass(frozen=True)
class SettingsFile:
    """Settings that a command reads from a file, which is written before it runs."""

    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Step:
    """One of our commands.

    command: of KINDS. settings: by name, without output; a value may be, or hold, an Output.
    label: what it makes, in a word or two, for the name of its output.
    suffix: of an output that is a file.
    serves: annotator that a service hosts meanwhile: one that is made, or a Hub id.
    after: a step that has to be done before, whose output this does not read.
    gpus: processes that share the work.
    """

    command: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""
    serves: Output | str | None = None
    after: Step | None = None
    gpus: int = 1

    @property
    def made(self) -> Output:
        """What it makes."""
        return Output(self)

    @cached_property
    def inputs(self) -> tuple[Step, ...]:
        """The steps that have to be done before, without theirs."""
        found = [*_steps_in(self.settings), *_steps_in(self.serves)]
        return tuple(dict.fromkeys([*found, *([self.after] if self.after else [])]))

    @cached_property
    def key(self) -> str:
        """Eight hex digits that depend on all that the output depends on."""
        after = self.after.name if self.after else None
        settings = {name: self.settings[name] for name in self.settings if name not in _NO_EFFECT}
        parts = [self.command, _keyed(settings), _keyed(self.serves), after]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

    @cached_property
    def name(self) -> str:
        """Of its output, in the folder of all."""
        return f"{self.label}-{self.key}{self.suffix}"

    def path(self, root: Path) -> Path:
        """Of its output."""
        return root / self.name

    def parsed(self, root: Path) -> BaseModel:
        """Its settings as the command reads them. Raises: ConfigError naming the step."""
        values = _resolved(self.settings, root, self) | {"output": self.path(root)}
        settings_class = KINDS[self.command].settings
        try:
            for value in self.settings.values():
                if isinstance(value, SettingsFile):
                    Alignment.model_validate(
                        {**value.settings, "model": "-", "data": "-", "output": "-"}
                    )
            return settings_class.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = " ".join(str(part) for part in first["loc"])
            raise ConfigError(f"{self.name}: {self.command}: {place} {first['msg']}") from error

    def words(self, root: Path) -> list[str]:
        """The command as one types it, without `cwpo`."""
        kind = KINDS[self.command]
        values = _resolved(self.settings, root, self)
        flags = {name: value for name, value in values.items() if name not in kind.positional}
        words = self.command.split()
        for name in kind.positional:
            value = values[name]
            words += value if isinstance(value, list) else [str(value)]
        for name, value in (flags | {"output": self.path(root)}).items():
            words += _flag_words(name, value)
        return words

    def settings_files(self, root: Path) -> dict[Path, str]:
        """The text of each file of settings that it reads, by its path."""
        return {
            _file_path(root, self, name): yaml.safe_dump(dict(value.settings), sort_keys=False)
            for name, value in self.settings.items()
            if isinstance(value, SettingsFile)
        }


def in_order(wanted: Sequence[Step]) -> list[Step]:
    """The steps and all that have to be done before them, each after its inputs, none twice."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.name not in ordered:
            for each in step.inputs:
                visit(each)
            ordered[step.name] = step

    for step in wanted:
        visit(step)
    return [*ordered.values()]


def _flag_words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if isinstance(value, Mapping):
        return [word for key, each in value.items() for word in (flag(name), f"{key}={each}")]
    if isinstance(value, list | tuple):
        return [word for each in value for word in (flag(name), str(each))]
    return [flag(name), str(value)]


def _resolved(settings: Mapping[str, Any], root: Path, step: Step) -> dict[str, Any]:
    """The settings with paths below `root` in the place of outputs."""

    def resolve(name: str, value: Any) -> Any:
        if isinstance(value, Output):
            return str(value.step.path(root) / value.file)
        if isinstance(value, SettingsFile):
            return str(_file_path(root, step, name))
        if isinstance(value, SharedFolder):
            return str(root / value.name)
        if isinstance(value, Mapping):
            return {str(resolve(name, key)): each for key, each in value.items()}
        if isinstance(value, tuple):
            return [resolve(name, each) for each in value]
        return value

    return {name: resolve(name, value) for name, value in settings.items()}


def _file_path(root: Path, step: Step, name: str) -> Path:
    return root / f"{step.name}.{name}.yaml"


def _steps_in(value: Any) -> Iterator[Step]:
    if isinstance(value, Output):
        yield value.step
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _steps_in(key)
            yield from _steps_in(each)
    elif isinstance(value, tuple):
        for each in value:
            yield from _steps_in(each)


def _keyed(value: Any) -> Any:
    """The value as JSON, with the names of steps in the place of outputs."""
    if isinstance(value, Output):
        return [value.step.name, value.file]
    if isinstance(value, SettingsFile):
        return _keyed(value.settings)
    if isinstance(value, Mapping):
        return [[_keyed(key), _keyed(each)] for key, each in value.items()]
    if isinstance(value, tuple | list):
        return [_keyed(each) for each in value]
    if isinstance(value, LocalPath):
        return value.digest
    return str(value) if isinstance(value, Path) else value


@cache
def _digest(path: str) -> str:
    place = Path(path)
    if not place.exists():
        return path
    digest = hashlib.sha256()
    for each in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
