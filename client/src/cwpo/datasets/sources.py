"""Inputs of this machine: files of every format, folders, patterns, and rows in memory."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from pydantic import BaseModel

from cwpo.datasets import delimited, hub, triplets
from cwpo.datasets.naming import Form, named
from cwpo.datasets.records import Rows, records
from cwpo.errors import DatasetError

FORMATS = ".jsonl, .jsonl.gz, .parquet, .csv or .tsv"
Source = str | Path | Rows
"""A path (file, folder, pattern or hub:owner/name@split), several, or rows in memory."""
NumberedRows = Iterator[tuple[int, dict[str, Any] | str]]


def source_files(given: Path) -> list[Path]:
    """The file, those in the folder, or those that the pattern matches, by name.

    Of a dataset of the Hub (hub:owner/name@split), it is one file with its rows.
    Raises: DatasetError if there are none of a known format; as `hub.file`.
    """
    if hub.is_hub(given):
        return [hub.file(str(given))]
    if given.is_dir():
        files = sorted(file for file in given.iterdir() if _is_known(file))
        if not files:
            raise DatasetError(f"{given}: this folder holds no {FORMATS} file")
        return files
    if given.exists() or not glob.has_magic(str(given)):
        return [_known(triplets.readable(given))]
    files = sorted(Path(found) for found in glob.glob(str(given), recursive=True))
    if not files:
        raise DatasetError(f"{given}: no file has such a name")
    return [_known(file) for file in files if file.is_file()]


def rows_in(path: Path) -> NumberedRows:
    """The number and the object of each row of a file, as `triplets.read_rows`.

    Raises: DatasetError, which names the file, if it cannot be read.
    """
    with path.open("rb") as stream, _naming(path):
        yield from _rows(stream, path)


def rows_through(
    files: Sequence[Path], forms: Sequence[Form], columns: Mapping[str, str] | None = None
) -> NumberedRows:
    """The rows of all files as those of one, under the names that they need.

    Args: as of `naming.named`.
    Raises: DatasetError, which names the file, as `rows_in` and `naming.named` do.
    """
    return triplets.rows_through(_named_rows(file, forms, columns) for file in files)


def expect_columns(
    files: Iterable[Path], forms: Sequence[Form], columns: Mapping[str, str] | None = None
) -> None:
    """Look at the first rows of each file. Raises: DatasetError as rows_through does."""
    for file in files:
        next(_named_rows(file, forms, columns), None)


def count_rows(files: Iterable[Path]) -> int:
    """The number of rows of all files. Raises: DatasetError as rows_in does."""
    return sum(_count(path) for path in files)


@contextmanager
def uploads(
    source: Source,
    forms: Sequence[Form],
    columns: Mapping[str, str] | None = None,
) -> Iterator[list[Path]]:
    """The files to upload for an input, within the block: those that it has, or written for it.

    A service reads JSON lines and Parquet, with columns of certain names. What has another form is
    written as JSON lines into a temporary folder; rows keep their numbers.

    Args:
        source: a path as of `source_files`, several of them, or rows as of `records`.
        forms, columns: as of `naming.named`.
    Raises: DatasetError for an input that cannot be read, or rows without the columns they need.
    """
    with TemporaryDirectory(prefix="cwpo-") as folder:
        paths = _paths(source)
        if paths is None:
            rows = named(enumerate(map(_as_dict, records(source)), 1), forms, columns)
            yield [_written(rows, Path(folder) / "rows.jsonl")]
            return
        expect_columns(paths, forms, columns)
        ready = []
        for number, path in enumerate(paths):
            if columns or delimited.delimiter_of(path.name):
                rows = _named_rows(path, forms, columns)
                # Some names are files in several folders.
                ready.append(_written(rows, Path(folder) / f"{number}-{path.name}.jsonl"))
            else:
                ready.append(path)
        yield ready


def _paths(source: object) -> list[Path] | None:
    """The files of a path, or of several; None for what is no path."""
    if isinstance(source, str | Path):
        return source_files(Path(source))
    if (
        isinstance(source, list | tuple)
        and source
        and all(isinstance(each, str | Path) for each in source)
    ):
        return [file for each in source for file in source_files(Path(each))]
    return None


def _named_rows(
    path: Path, forms: Sequence[Form], columns: Mapping[str, str] | None
) -> NumberedRows:
    rows = rows_in(path)
    with _naming(path):
        yield from named(rows, forms, columns)


def _rows(stream: BinaryIO, path: Path) -> NumberedRows:
    delimiter = delimited.delimiter_of(path.name)
    if delimiter is None:
        return triplets.read_rows(stream, triplets.file_format(path))
    is_compressed = path.name.lower().endswith(".gz")
    return delimited.read_rows(stream, delimiter, is_compressed=is_compressed)


def _count(path: Path) -> int:
    with path.open("rb") as stream, _naming(path):
        if delimited.delimiter_of(path.name) is None:
            return triplets.count_rows(stream, triplets.file_format(path))
        return sum(1 for _ in _rows(stream, path))


def _as_dict(record: Any) -> Any:
    return record.model_dump(exclude_none=True) if isinstance(record, BaseModel) else record


def _written(rows: Iterable[tuple[int, Any]], path: Path) -> Path:
    """Write the rows as JSON lines, each in the line of its number."""
    line = 0
    with path.open("wb") as out:
        for number, row in rows:
            out.write(b"\n" * (number - line - 1))
            out.write(_line(number, row))
            line = number
    return path


def _line(number: int, row: Any) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False)
    except TypeError as error:
        raise DatasetError(f"row {number} cannot be written as JSON: {error}") from error
    # Half of a surrogate pair becomes its escape again, which the service rejects.
    return (text + "\n").encode(errors="backslashreplace")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except DatasetError as error:
        if str(path) in str(error):
            raise
        raise DatasetError(f"{path}: {error}") from error


def _is_known(path: Path) -> bool:
    return triplets.is_triplet_file(path.name) or delimited.delimiter_of(path.name) is not None


def _known(path: Path) -> Path:
    if not _is_known(path):
        raise DatasetError(f"{path}: not a {FORMATS} file")
    return path
