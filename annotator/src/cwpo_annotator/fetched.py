"""An annotator that was copied from an object store or the Hub, and checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec

from cwpo.errors import ConfigError, first_line
from cwpo_annotator.checkpoint import CheckpointError, check, resolve, revisions


def fetch(source: str, folder: Path, *, revision: str | None) -> str:
    """Copy an annotator, and check that it is the one that is meant.

    The folder appears only once it is complete. If it is there already, nothing is copied, and its
    content is checked alone.

    Args:
        source: a URL of fsspec (s3://bucket/annotator), a Hub id, or a folder.
        revision: 12 hex digits, as `cwpo model show`, every dataset and every answer name it; None
            takes any annotator.
    Returns: the revision. Raises: CheckpointError for one that cannot be read, is no annotator, or
        has another revision, which is not kept; ConfigError without the driver of such URLs.
    """
    if folder.exists():
        return _expect(folder, str(folder), revision)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _copy(source, partial)
        found = _expect(partial, source, revision)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def _copy(source: str, folder: Path) -> None:
    if "://" not in source:
        shutil.copytree(resolve(source), folder, dirs_exist_ok=True)
        return
    try:
        files, path = fsspec.url_to_fs(source)
        files.get(f"{path.rstrip('/')}/", f"{folder}/", recursive=True)
    except ImportError as error:
        raise ConfigError(f"{source}: the driver is not installed: {first_line(error)}") from error
    except Exception as error:  # Each driver has errors of its own.
        raise CheckpointError(f"{source} cannot be read: {first_line(error)}") from error


def _expect(folder: Path, name: str, revision: str | None) -> str:
    """The revision of the annotator in the folder. Raises: CheckpointError for another one."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} holds no model: it has no config.json")
    check(folder)
    found = revisions(folder).current
    if revision is not None and found != revision:
        raise CheckpointError(f"{name} is of revision {found}, not {revision}")
    return found
