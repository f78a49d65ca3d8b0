"""Resuming an interrupted run, which needs the same settings and data as before.

These inputs are recorded in the run's folder at its start, and compared when it is resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import JsonValue

from cwpo.datasets.folder import MANIFEST
from cwpo.errors import ConfigError
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import RunFolder, last_checkpoint

_STARTED_NAME = "started.json"
# Settings that change nothing of what a training computes, up to rounding.
_WITHOUT_EFFECT = {
    "config",
    "dry_run",
    "resume",
    "threads",
    "world_size",
    "save_steps",
    "logging_steps",
    "report_to",
    "share_prompts",
    "push_to_hub",
    "max_rejected_share",
    "adapter_only",
    "gradient_checkpointing",
    "token_budget",
    "splits",
}

# Settings that runs of earlier versions do not name, with the values that they had.
_ADDED: dict[str, JsonValue] = {
    "max_grad_norm": 1.0,
    "set": {},
    "schedule": "cosine",
    "attn_implementation": None,
    "lora_targets": ["all-linear"],
    "keep_best": False,
    "confidence_as": "weight",
    "sharding": "none",
    "update": "rounds",
    "sampler": "transformers",
}


def checkpoint_to_resume(output: RunFolder, data: str | Path) -> Path | None:
    """The checkpoint that --resume continues from; None if the run starts from the beginning.

    Args:
        data: value of --data.
    Raises: ConfigError naming the first input that differs from the start of the run.
    """
    inputs = inputs_of(
        output.settings, without_effect=_WITHOUT_EFFECT, files={"data": Path(data)}
    ) | {"number of processes": process.world_size()}
    checkpoint = last_checkpoint(output.path)
    if checkpoint is not None:
        check_start(output.path, inputs)
    elif process.is_main():
        note_start(output.path, inputs)
    return checkpoint


def inputs_of(
    settings: Mapping[str, JsonValue], *, without_effect: Collection[str], files: Mapping[str, Path]
) -> dict[str, JsonValue]:
    """The inputs of a run: its settings, and the contents of the files that it reads.

    Args:
        without_effect: settings that do not count.
        files: by what they hold. Of one that does not exist, such as data from the Hub, its name in
            the settings has to do.
    """
    named = {name: value for name, value in settings.items() if name not in without_effect}
    there = {name: content for name, path in files.items() if (content := _content(path)).is_file()}
    return named | {f"sha256 of {name}": sha256_of(content) for name, content in there.items()}


def is_started(folder: Path) -> bool:
    """Whether the folder has the inputs of a run that was started."""
    return (folder / _STARTED_NAME).exists()


def note_start(folder: Path, inputs: Mapping[str, JsonValue]) -> None:
    """Record the inputs of the run that starts in the folder."""
    (folder / _STARTED_NAME).write_text(json.dumps(inputs, indent=2) + "\n")


def started_with(folder: Path) -> dict[str, JsonValue]:
    """The inputs that the run in the folder started with."""
    inputs: dict[str, JsonValue] = json.loads((folder / _STARTED_NAME).read_text())
    return inputs


def check_start(folder: Path, inputs: Mapping[str, JsonValue]) -> None:
    """Compare the inputs of a run with those recorded at its start.

    Raises: ConfigError naming the first input that differs.
    """
    before = _ADDED | started_with(folder)
    for name, value in inputs.items():
        if before.get(name) != value:
            raise ConfigError(
                f"--resume: {name} was {before.get(name)} at the start of this run and is {value} "
                f"now: set it back, or remove {folder} to start again"
            )


def _content(path: Path) -> Path:
    """The file itself; of a folder of parts its manifest, which has the checksums of all parts."""
    return path / MANIFEST if path.is_dir() else path


def sha256_of(path: Path) -> str:
    """The hash of a file's contents, in hex. Raises: OSError."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
