"""Rows of tables as text: CSV and TSV, with a line of names first."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from cwpo.errors import DatasetError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Of a cell. The csv module stops at 128 KiB unless it is told so, for the whole process.
_MAX_CELL_CHARACTERS = 64 << 20


def delimiter_of(name: str) -> str | None:
    """What stands between the cells of a file of this name; None if it is no such table."""
    suffixless = name.lower().removesuffix(".gz")
    return next((sign for end, sign in _DELIMITERS.items() if suffixless.endswith(end)), None)


def read_rows(
    source: BinaryIO, delimiter: str, *, is_compressed: bool = False
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number (from 1) of each row below the names, and the row; all of its values are text.

    A row that is longer than the line of names is given as the reason to reject it.
    Raises: DatasetError for what is not UTF-8, or not gzip.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    stream = gzip.GzipFile(fileobj=source) if is_compressed else source
    number = 0
    try:
        # Excel begins UTF-8 with a byte order mark.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        for number, row in enumerate(csv.DictReader(text, delimiter=delimiter), 1):
            if None in row:
                yield number, f"the row has more cells than the {len(row) - 1} names above it"
            else:
                yield number, {name: cell for name, cell in row.items() if cell is not None}
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8 after row {number}: save the table as UTF-8") from error
    except csv.Error as error:
        raise DatasetError(f"no table that can be read, after row {number}: {error}") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise DatasetError(f"the gzip data ends too early, after row {number}: {error}") from error
