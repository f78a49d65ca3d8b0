"""The weighted dataset as a folder: Parquet files, in the order of their names.

A downloaded job has a manifest besides, which lists them. They are named so that whatever reads the
folder's `*.parquet` reads the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from cwpo import columns
from cwpo.errors import DatasetError, mistake_in
from cwpo.partial_file import ResumableFile, partial_file
from cwpo.types import DatasetPart, DatasetParts, ResultFormat

MANIFEST = "dataset.json"
# Stands in the folder of a download until all parts are there.
_INCOMPLETE = "dataset.incomplete"


def dataset_files(path: Path) -> list[Path]:
    """The files of a weighted dataset in the order of its rows: the file, or those in the folder.

    Raises: DatasetError for a folder without Parquet files, or a downloaded job that lacks a part
        or has it in another size.
    """
    if not path.is_dir():
        return [path]
    if (path / _INCOMPLETE).exists():
        raise DatasetError(
            f"{path}: its download was interrupted: repeat `cwpo jobs download ID -o {path}`, "
            "which gets what is missing"
        )
    files = _listed(path) if (path / MANIFEST).exists() else sorted(path.glob("*.parquet"))
    if not files:
        raise DatasetError(f"{path}: holds no .parquet file")
    return files


def result_format(path: Path) -> ResultFormat | None:
    """The format of an output, by its suffix; None for a folder, which exists or has no suffix.

    Raises: DatasetError for an unknown suffix.
    """
    if path.is_dir() or not path.suffix:
        return None
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix == ".jsonl":
        return "jsonl"
    raise DatasetError(f"{path}: an output is a .parquet or a .jsonl file, or a folder")


def part_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a part, with extra columns of JSON as the values that they were."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from columns.rows_of(pa.Table.from_batches([batch]))


class DatasetFolder:
    """A folder to which a dataset is downloaded; the manifest is written last.

    Args:
        path: the folder; created if it is missing.
        dataset: all parts of the dataset.
    Raises: DatasetError if the folder has parts of another dataset, which readers would mix in.
    """

    def __init__(self, path: Path, dataset: DatasetParts) -> None:
        self._path = path
        # Without the URLs, with which anybody could read the data for a while.
        parts = [part.model_copy(update={"url": None}) for part in dataset.parts]
        listed = dataset.model_copy(update={"parts": parts, "next_cursor": None})
        self._manifest = listed.model_dump_json(by_alias=True, exclude_none=True, indent=1)
        path.mkdir(parents=True, exist_ok=True)
        foreign = {file.name for file in path.glob("*.parquet")} - {part.name for part in parts}
        if foreign:
            raise DatasetError(
                f"{path}: {min(foreign)} does not belong to this dataset: name a new folder"
            )
        manifest = path / MANIFEST
        if manifest.is_file() and manifest.read_text() == self._manifest:
            return
        (path / _INCOMPLETE).touch()
        manifest.unlink(missing_ok=True)

    def file(self, part: DatasetPart) -> ResumableFile:
        """The file of a part."""
        return ResumableFile(self._path / part.name, part.bytes, part.sha256)

    def publish(self) -> Path:
        """Write the manifest, and return the folder. All files have to be there."""
        with partial_file(self._path / MANIFEST) as out:
            out.write(self._manifest.encode())
        (self._path / _INCOMPLETE).unlink(missing_ok=True)
        return self._path


def _listed(folder: Path) -> list[Path]:
    """The parts that the manifest lists."""
    path = folder / MANIFEST
    try:
        parts = DatasetParts.model_validate_json(path.read_bytes()).parts
    except ValidationError as error:
        raise DatasetError(f"{path}: {mistake_in(error)}") from error
    for part in parts:
        file = folder / part.name
        if not file.is_file() or file.stat().st_size != part.bytes:
            raise DatasetError(
                f"{folder}: {part.name} is missing or has not {part.bytes:,} bytes: download the "
                "job to this folder again, which gets what is missing"
            )
    return [folder / part.name for part in parts]
