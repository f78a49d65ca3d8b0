"""The output folder of one run of a command: its files, and how it is written.

The names of its files are defined here and nowhere else.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from cwpo.errors import ConfigError, DatasetError, mistake_in
from cwpo_trainer.run import process

RECORD_NAME = "run.json"
README_NAME = "README.md"
LOG_NAME = "training.jsonl"
SFT_LOG_NAME = "sft.jsonl"
SAMPLES_NAME = "samples.jsonl"
MISTAKES_NAME = "mistakes.jsonl"
TO_LABEL_NAME = "to_label.csv"
ROUNDS_NAME = "rounds.jsonl"
PAIRS_NAME = "pairs.jsonl"
LLM_JUDGE_NAME = "llm_judge.jsonl"
REJECTED_NAME = "rejected.jsonl"
REPORT_NAME = "report.html"
CHECKPOINTS_NAME = "checkpoints"
ADAPTER_FOLDER = "adapter"
STATE_NAME = "trainer_state.json"

Kind = Literal["train-annotator", "sft", "align", "online", "evaluate-annotator", "evaluate-policy"]
_LIBRARIES = ("cwpo-trainer", "torch", "transformers", "trl", "peft")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


class RunRecord(BaseModel):
    """run.json: the command, its settings, the versions of libraries, and the results."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    settings: dict[str, JsonValue]
    results: dict[str, JsonValue]
    seconds: float
    started_at: datetime
    versions: dict[str, str] = Field(default_factory=_versions)


class RunFolder:
    """The output folder while its run is under way.

    results: what goes to run.json besides the settings.
    """

    def __init__(self, kind: Kind, settings: dict[str, JsonValue], path: Path) -> None:
        self.kind = kind
        self.settings = settings
        self.path = path
        self.results: dict[str, JsonValue] = {}
        self._started = datetime.now(UTC)

    def record(self) -> RunRecord:
        """What run.json would say now."""
        return RunRecord(
            kind=self.kind,
            settings=self.settings,
            results=self.results,
            started_at=self._started,
            seconds=round((datetime.now(UTC) - self._started).total_seconds(), 1),
        )

    def write_record(self) -> None:
        """Write run.json."""
        (self.path / RECORD_NAME).write_text(self.record().model_dump_json(indent=2) + "\n")


@contextmanager
def new_run_folder(
    kind: Kind, path: Path, settings: dict[str, JsonValue], *, resume: bool = False
) -> Iterator[RunFolder]:
    """A folder that appears under its name only when the run is complete.

    Until the block has ended well its files stand in `.NAME.partial` beside it, which outlives a
    block that fails where it holds a checkpoint. Of several ranks only the first touches the disk.

    Args:
        resume: keep what an interrupted run left there.
    Raises: ConfigError, before any work, where the folder exists already, or a run could be resumed
        and is not.
    """
    resumed = check_output(path, resume=resume)
    partial = _partial(path)
    if process.is_main() and not resumed:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    folder = RunFolder(kind, settings, partial)
    try:
        yield folder
        if process.is_main():
            folder.write_record()
            shutil.rmtree(partial / CHECKPOINTS_NAME, ignore_errors=True)
            _share_weights(partial)
            partial.rename(path)
    finally:
        if process.is_main() and last_checkpoint(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)


def _share_weights(folder: Path) -> None:
    """Let those read the weights who may read the record.

    safetensors writes them for their owner alone, and containers run as another user.
    """
    mode = (folder / RECORD_NAME).stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def check_output(path: Path, *, resume: bool) -> bool:
    """Check, before data is read, that a run may become this folder.

    Returns: whether it goes on from a checkpoint. Raises: ConfigError as `new_run_folder` does.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already: remove it, or choose another --output")
    partial = _partial(path)
    has_checkpoint = last_checkpoint(partial) is not None
    if has_checkpoint and not resume:
        raise ConfigError(
            f"{partial} holds the checkpoints of an interrupted run: continue with --resume, or "
            "remove it to start anew"
        )
    return has_checkpoint


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in the folder of a run; None without one."""
    found = (folder / CHECKPOINTS_NAME).glob("checkpoint-*")
    # The trainer writes its state last.
    complete = [path for path in found if (path / STATE_NAME).is_file()]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def read_record(folder: Path) -> RunRecord:
    """The folder's run.json. Raises: DatasetError where there is none that can be read."""
    path = folder / RECORD_NAME
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise DatasetError(f"{path}: {mistake_in(error)}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON lines file of a run folder; none where there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]
