"""The datasets that TRL's trainers read: token ids in Arrow files, mapped into memory.

A file of pairs is tokenised by the first run that reads it with a tokenizer, into the folder
`cwpo` of the cache of Hugging Face datasets. Later runs, resumed ones and other processes find it
there by its content, and none has a Python object for each row.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cwpo.errors import ConfigError, DatasetError
from cwpo.types import Prompt
from cwpo_trainer.data.left_out import left_out
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import PairFile, WeightedPair, evaluation_rows
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import RunFolder
from cwpo_trainer.settings.mixins import Evaluation

# Rows made at once, so that few token ids stand in memory as Python numbers.
_ROWS_AT_ONCE = 1024
_TOKENS_NAME, _UNUSED_NAME = "tokens.arrow", "unused.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Form:
    """What is kept of each pair as token ids.

    columns: their names; rows: makes these columns of pairs, and `tokens`, the length of the
    longest text of a pair.
    """

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Formatter, Sequence[WeightedPair]], list[dict[str, Any]]]

    @property
    def schema(self) -> pa.Schema:
        """Of the Arrow file."""
        ids = [(name, pa.list_(pa.int32())) for name in self.columns]
        numbers = [("tokens", pa.int32()), ("confidence", pa.float32())]
        return pa.schema([*ids, *numbers, ("prompt_pairs", pa.int32()), ("certified", pa.bool_())])


class Fitting(NamedTuple):
    """A dataset, and how many items had no place in it."""

    dataset: Dataset
    too_long: int

    @property
    def results(self) -> dict[str, Any]:
        """The figures for run.json."""
        return {"pairs": len(self.dataset), "pairs_too_long": self.too_long}


@dataclass(frozen=True, slots=True)
class TokenFile:
    """All pairs of a file as token ids.

    dataset: has the columns of a Form; unused: the other rows of the file.
    """

    source: PairFile
    dataset: Dataset
    unused: UnusedRows

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def confidences(self) -> NDArray[np.float32]:
        """Shape (pairs,)."""
        return self.numbers("confidence")

    @property
    def prompt_pairs(self) -> NDArray[np.int32] | None:
        """The number of pairs of each pair's prompt, shape (pairs,); None for triplets."""
        column = self.dataset.data.column("prompt_pairs")
        return None if column.null_count else self.numbers("prompt_pairs")

    @property
    def certified(self) -> NDArray[np.bool_] | None:
        """Whether each label is certified, shape (pairs,); None where the file does not tell."""
        column = self.dataset.data.column("certified")
        return None if column.null_count else self.numbers("certified")

    def numbers(self, column: str) -> NDArray[Any]:
        """A column of numbers or booleans, shape (pairs,)."""
        return np.asarray(self.dataset.data.column(column))

    def with_numbers(self, **columns: NDArray[Any]) -> TokenFile:
        """The same with more columns, shape (pairs,) each."""
        dataset = self.dataset
        for name, values in columns.items():
            dataset = dataset.add_column(name, values)
        return replace(self, dataset=dataset)

    def prompts(self) -> list[Prompt]:
        """The prompt of each pair, read from the file once more."""
        return [pair.prompt for pair in self.source.pairs(UnusedRows(1))]


@dataclass(frozen=True, slots=True)
class Part:
    """The pairs of a file at which `rows`, shape (pairs,), is true."""

    file: TokenFile
    rows: NDArray[np.bool_]

    def only(self, rows: NDArray[np.bool_]) -> Part:
        """Those at which `rows`, shape (pairs,), is true, too."""
        return replace(self, rows=self.rows & rows)

    def fitting(self, max_length: int) -> Fitting:
        """Those of which no text is longer than max_length tokens.

        What is left out is said on stderr. Raises: DatasetError when nothing is left.
        """
        fits = self.rows & (self.file.numbers("tokens") <= max_length)
        total, left = int(self.rows.sum()), int(fits.sum())
        if not left:
            raise DatasetError(f"all {total:,} pairs are longer than --max-length {max_length:,}")
        if left < total and process.is_main():
            reasons = Counter(too_long=total - left)
            line = left_out(reasons, total, limit=max_length, flag="--max-length")
            print(line, file=sys.stderr)
        dataset = self.file.dataset
        if left < len(dataset):
            dataset = dataset.select(np.flatnonzero(fits))
        return Fitting(dataset, total - left)


def parts(
    read: Callable[[Path], TokenFile], data: Path, evaluation: Evaluation, *, seed: int
) -> tuple[Part, Part | None]:
    """The pairs to train on, and those to evaluate on, if any: of their own file, or a share.

    Raises: DatasetError.
    """
    file = read(data)
    whole = Part(file, np.ones(len(file), dtype=bool))
    if evaluation.eval_data is not None:
        other = read(evaluation.eval_data)
        return whole, Part(other, np.ones(len(other), dtype=bool))
    if not evaluation.eval_fraction:
        return whole, None
    kept = evaluation_rows(file.prompts(), evaluation.eval_fraction, seed=seed)
    return whole.only(~kept), whole.only(kept)


def token_file(
    source: PairFile, form: Form, tokenizer: PreTrainedTokenizerBase, *, max_rejected_share: float
) -> TokenFile:
    """The pairs of a file as token ids, made by the first process that asks for them.

    Raises: DatasetError; ConfigError where the cache cannot be written.
    """
    made_by = [version("cwpo-trainer"), form.name, *form.schema.names]
    parts = [*made_by, source.fingerprint, _fingerprint(tokenizer)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "cwpo" / key

    def make(partial: Path) -> None:
        unused = UnusedRows(max_rejected_share)
        _write(partial / _TOKENS_NAME, form, Formatter(tokenizer), source.pairs(unused))
        unused.keep(partial / _UNUSED_NAME)

    _make_once(folder, make)
    unused = UnusedRows.kept(folder / _UNUSED_NAME, max_rejected_share)
    unused.check(source.path, has_good=True)
    return TokenFile(source, Dataset.from_file(str(folder / _TOKENS_NAME)), unused)


def report_unused(output: RunFolder, training: Part, evaluation: Part | None) -> None:
    """Report the rows that were left out of each file that was read."""
    training.file.unused.report(output)
    if evaluation is not None and evaluation.file is not training.file:
        evaluation.file.unused.report(output, "eval")


def in_python(dataset: Dataset, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The values of these columns in each row; few rows are in memory as Python objects."""
    for batch in dataset.select_columns([*columns]).iter(_ROWS_AT_ONCE):
        yield from zip(*(batch[name] for name in columns), strict=True)


def named(results: dict[str, Any], part: str) -> dict[str, Any]:
    """The figures under names that start with the part's, such as eval_pairs."""
    return {f"{part}_{name}": value for name, value in results.items()}


def _write(path: Path, form: Form, formatter: Formatter, pairs: Iterable[WeightedPair]) -> None:
    schema = form.schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for some in _batches(pairs):
            rows = form.rows(formatter, some)
            for row, pair in zip(rows, some, strict=True):
                row |= {
                    "confidence": pair.confidence,
                    "prompt_pairs": pair.prompt_pairs,
                    "certified": pair.certified,
                }
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := [*islice(rest, _ROWS_AT_ONCE)]:
        yield batch


def _make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have a folder made whole by one process, for which the others of its machine wait."""
    # Torchrun ends them where the first one fails.
    while not (process.is_first_here() or folder.is_dir()):
        time.sleep(0.1)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder.parent}: {error.strerror or error}: name another folder in HF_DATASETS_CACHE"
        ) from error


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what makes token ids of texts."""
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    digest.update(str(sorted(tokenizer.special_tokens_map.items())).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # Its configuration also says where it was loaded from.
        files = [path for path in Path(folder).rglob("*") if path.name != "tokenizer_config.json"]
        for path in sorted(filter(Path.is_file, files)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
