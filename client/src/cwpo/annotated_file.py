"""Annotate a whole file, by requests or by a batch job; rejected rows go to a second file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from cwpo.certificates import certificate_of
from cwpo.client import Client
from cwpo.columns import Column
from cwpo.datasets.folder import result_format
from cwpo.datasets.naming import forms_of
from cwpo.datasets.ranked import RankedPairs
from cwpo.datasets.sources import count_rows, expect_columns, rows_through, source_files
from cwpo.datasets.triplets import (
    NumberedItem,
    NumberedRow,
    NumberedTriplet,
    RejectedRow,
    asking_order,
    by_reason,
    extra_columns,
    rows_of_responses,
    triplets_of,
)
from cwpo.datasets.weighted import JsonlWriter, weighted_row, weighted_writer
from cwpo.errors import DatasetError
from cwpo.partial_file import partial_file
from cwpo.progress import Progress
from cwpo.resources.jobs import show_job, succeeded
from cwpo.types import (
    Annotation,
    Certificate,
    FailedAnnotation,
    Job,
    Merge,
    ModelInfo,
    Pairs,
    Ranking,
    ResultFormat,
    Truncation,
)

JOB_ABOVE_ROWS = 5000
# Triplets that are read at a time and sent by prompt.
_WINDOW_ROWS = 8192
# Of the dataset: a row of the input may have 2,016.
_WRITTEN_ROWS = 4096
# The flag that would annotate the rows that were rejected for this reason.
_FLAG_THAT_KEEPS = {
    "too_long": "`--truncation prompt_left` of `cwpo annotate` or `cwpo jobs submit`"
}


T = TypeVar("T")
_Label = Annotation | RankedPairs | FailedAnnotation


@dataclass(frozen=True)
class AnnotatedFile:
    """A weighted dataset, a file or a folder, with the numbers of annotated and rejected rows.

    rejected: number of rejected rows for each reason (code of an ItemError); the rows are in the
    file at `errors_path(path)`.
    pairs: number of rows of the dataset, where a row of the input may have several.
    certificates_void: why the column certified promises nothing, if it does not.
    """

    path: Path
    rows: int
    rejected: Counter[str]
    pairs: int | None = None
    certificates_void: str | None = None

    def expect_labels(self) -> None:
        """Raises: DatasetError, with the first reason, if no row was annotated."""
        if self.rows:
            return
        if not self.rejected:
            raise DatasetError("nothing was annotated: the input has no rows")
        with errors_path(self.path).open() as lines:
            first = json.loads(lines.readline())
        raise DatasetError(f"nothing was annotated: row {first['row']}: {first['detail']}")

    def as_dict(self) -> dict[str, Any]:
        """The files and the numbers, for programs; a void certificate only where there is one."""
        void = self.certificates_void
        return {
            "output": str(self.path),
            "rows": self.rows,
            "pairs": self.pairs,
            "rejected": dict(self.rejected),
            "errors": str(errors_path(self.path)),
            **({} if void is None else {"certificates_void": void}),
        }

    def summary(self) -> str:
        """The numbers of annotated and rejected rows, and what is wrong with certificates."""
        pairs = "" if self.pairs is None else f"{self.pairs:,} pairs of "
        lines = [f"{self.path}: {pairs}{self.rows:,} rows"]
        rejected = self.rejected.total()
        if rejected:
            reasons = by_reason(self.rejected)
            kept = "".join(
                f" Keep {'them' if count == rejected else f'those {code}'} with {flag};"
                for code, flag in _FLAG_THAT_KEEPS.items()
                if (count := self.rejected[code])
            )
            lines.append(
                f"{rejected:,} of {self.rows + rejected:,} rows rejected: {reasons}"
                f"{'.' if kept else ';'}{kept} see {errors_path(self.path)}"
            )
        if self.certificates_void is not None:
            lines.append(
                f"The column certified promises nothing of this data: {self.certificates_void}"
            )
        return "\n".join(lines)


def annotate_file(
    client: Client,
    source: Path,
    output: Path,
    *,
    columns: Mapping[str, str] | None = None,
    truncation: Truncation = "error",
    pairs: Pairs | None = None,
    max_error: float | None = None,
    job_above: int = JOB_ABOVE_ROWS,
) -> AnnotatedFile:
    """Annotate a file of triplets, with progress on stderr; outputs appear only when complete.

    Args:
        source: a file of triplets (JSONL, Parquet, CSV or TSV); or a folder or a pattern of such
            files, which are annotated as one.
        output: .parquet or .jsonl to write, or a folder for a batch job's parts; rejected rows go
            to `errors_path(output)`.
        columns: the input's names of columns, by the names that are needed.
        truncation: treatment of texts that are too long for the annotator: "error" rejects the
            row, "prompt_left" drops the oldest tokens of the prompt.
        pairs: pairs for each row that has a list of responses, as of `client.jobs.create`; without
            it, such rows are rejected.
        max_error: as of `client.jobs.create`: adds the column certified.
        job_above: files with more rows than this become a batch job; smaller ones are sent in
            requests.

    Raises: DatasetError for a file that cannot be read, or that lacks the columns that are needed,
        or an output of another format;
        ConfigError if the annotator has no certificate of max_error that holds; JobFailedError;
        APIError and ConnectionFailedError as the client does, and so ModelRevisionError if the
        service changes its annotator meanwhile.
    """
    format = result_format(output)
    files = source_files(source)
    expect_columns(files, forms_of(pairs), columns)
    rows = count_rows(files)
    if format is None or rows > job_above:
        merge: Merge = "never" if format is None else "auto"
        if max_error is not None:
            # Before the file is uploaded.
            _certificate(client.model(), max_error)
        job = client.jobs.submit(
            files,
            columns=columns,
            truncation=truncation,
            merge=merge,
            pairs=pairs,
            max_error=max_error,
            progress=True,
        )
        annotated = download_job(client, succeeded(follow_job(client, job.id)), output)
    else:
        model = client.model()
        certificate = None if max_error is None else _certificate(model, max_error)
        asking = _Asking(client, files, columns, truncation, pairs, model, certificate)
        annotated = _annotate_by_requests(asking, output, format, rows)
    if max_error is None:
        return annotated
    # Now that the service has seen these rows.
    return replace(annotated, certificates_void=client.model().certificates_void)


def _certificate(model: ModelInfo, max_error: float) -> Certificate:
    return certificate_of(model.certificates, max_error, void=model.certificates_void)


def follow_job(client: Client, job_id: str) -> Job:
    """Wait until the job has ended, showing its progress on stderr; returns the ended job."""
    job = client.jobs.get(job_id)
    with Progress(f"job {job.state}", unit="rows", done=job.progress.rows_done) as progress:
        for job in client.jobs.events(job_id):
            show_job(progress, job)
    return job


def download_job(client: Client, job: Job, output: Path) -> AnnotatedFile:
    """Save an ended job's weighted dataset, and its rejected rows in a file next to it.

    Args:
        output: .parquet or .jsonl to write, or a folder for the dataset's parts.

    Shows progress on stderr.
    """
    format = result_format(output)
    errors = client.jobs.download_errors(job.id, errors_path(output))
    with Progress("download", unit="bytes") as progress:
        if format is None:
            client.jobs.download_parts(job.id, output, progress=progress)
        else:
            client.jobs.download(job.id, output, format=format, progress=progress)
    with errors.open("rb") as lines:
        rejected = Counter(json.loads(line)["code"] for line in lines)
    return AnnotatedFile(
        output, job.progress.rows_annotated, rejected, job.progress.pairs_annotated
    )


def errors_path(output: Path) -> Path:
    """The file of rejected rows, such as `weighted.errors.jsonl` for `weighted.parquet`."""
    name = output.name if result_format(output) is None else output.stem
    return output.with_name(f"{name}.errors.jsonl")


@dataclass(frozen=True)
class _Asking:
    """How the rows of an input are read and annotated, and by which annotator."""

    client: Client
    files: Sequence[Path]
    columns: Mapping[str, str] | None
    truncation: Truncation
    pairs: Pairs | None
    model: ModelInfo
    certificate: Certificate | None

    def read(self) -> Iterator[NumberedRow | RejectedRow]:
        """The rows of the input."""
        rows = rows_through(self.files, forms_of(self.pairs), self.columns)
        return triplets_of(rows) if self.pairs is None else rows_of_responses(rows)

    def labels(self, rows: Sequence[NumberedRow]) -> Iterator[tuple[int, _Label]]:
        """The number and the label of each row, as they come; several requests are in flight."""
        triplets = [row for row in rows if isinstance(row, NumberedTriplet)]
        items = [row for row in rows if isinstance(row, NumberedItem)]
        how: dict[str, Any] = {"truncation": self.truncation, "revision": self.model.revision}
        if triplets:
            annotated = self.client.annotate_iter([row.triplet for row in triplets], **how)
            yield from zip([row.row for row in triplets], annotated, strict=True)
        if items and self.pairs is not None:
            ranked = self.client.rank_iter([row.item for row in items], **how)
            for row, label in zip(items, ranked, strict=True):
                if isinstance(label, Ranking):
                    yield row.row, RankedPairs.of(label, self.pairs, self.model.temperature)
                else:
                    yield row.row, label

    def weighted(
        self, row: NumberedRow, label: _Label, extra: Sequence[Column]
    ) -> Iterator[dict[str, Any]]:
        """The rows of the dataset, with all columns: those that the row went without as null."""
        values = {column.name: row.extra.get(column.name) for column in extra}
        if isinstance(row, NumberedTriplet) and isinstance(label, Annotation):
            prompt_pairs = None if self.pairs is None else 1
            yield weighted_row(row.triplet, label, values, prompt_pairs, self.certificate)
        elif isinstance(row, NumberedItem) and isinstance(label, RankedPairs):
            for pair in label.pairs:
                triplet, prompt_pairs = pair.triplet(row.item), len(label.pairs)
                yield weighted_row(triplet, pair.label, values, prompt_pairs, self.certificate)


def _annotate_by_requests(
    asking: _Asking, output: Path, format: ResultFormat, rows: int
) -> AnnotatedFile:
    annotated = written = 0
    rejected: Counter[str] = Counter()
    extra = extra_columns(asking.read())
    with (
        partial_file(output) as sink,
        partial_file(errors_path(output)) as errors_sink,
        Progress("annotate", unit="rows", total=rows) as progress,
    ):
        errors = JsonlWriter(errors_sink)
        about = (asking.model.ref(), extra, asking.certificate)
        with weighted_writer(sink, format, *about) as writer:
            for window in _windows(asking.read()):
                kept, failed = _labelled(asking, window, progress)
                weighted = (made for each in kept for made in asking.weighted(*each, extra))
                for some in _batches(weighted, _WRITTEN_ROWS):
                    writer.write(some)
                    written += len(some)
                errors.write(row.as_dict() for row in failed)
                annotated += len(kept)
                rejected.update(row.error.code for row in failed)
    return AnnotatedFile(output, annotated, rejected, None if asking.pairs is None else written)


def _labelled(
    asking: _Asking,
    window: Sequence[NumberedRow | RejectedRow],
    progress: Progress,
) -> tuple[list[tuple[NumberedRow, _Label]], list[RejectedRow]]:
    """The rows with their labels, and those that the reader or the annotator rejected, in order."""
    good = [row for row in window if not isinstance(row, RejectedRow)]
    progress.advance(len(window) - len(good))
    labels: dict[int, _Label] = {}
    for number, label in asking.labels([good[at] for at in asking_order(good)]):
        labels[number] = label
        progress.advance()
    kept: list[tuple[NumberedRow, _Label]] = []
    failed: list[RejectedRow] = []
    for row in window:
        if isinstance(row, RejectedRow):
            failed.append(row)
            continue
        label = labels[row.row]
        if isinstance(label, FailedAnnotation):
            failed.append(RejectedRow(row.row, label.id, label.error))
        else:
            kept.append((row, label))
    return kept, failed


def _windows(
    rows: Iterable[NumberedRow | RejectedRow],
) -> Iterator[list[NumberedRow | RejectedRow]]:
    """The rows that are read at a time; lists have as many responses together as triplets have."""
    window: list[NumberedRow | RejectedRow] = []
    responses = 0
    for row in rows:
        window.append(row)
        responses += len(row.item.responses) if isinstance(row, NumberedItem) else 2
        if responses >= 2 * _WINDOW_ROWS:
            yield window
            window, responses = [], 0
    if window:
        yield window


def _batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
