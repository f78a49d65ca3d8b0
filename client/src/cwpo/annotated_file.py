"""Annotate a whole file, by requests or by a batch job; rejected rows go to a second file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cwpo.client import Client
from cwpo.columns import Column
from cwpo.datasets.triplets import (
    NumberedTriplet,
    RejectedRow,
    by_reason,
    count_rows,
    extra_columns,
    file_format,
    read_triplets,
    readable,
)
from cwpo.datasets.weighted import JsonlWriter, weighted_row, weighted_writer
from cwpo.errors import DatasetError
from cwpo.partial_file import partial_file
from cwpo.progress import Progress
from cwpo.resources.jobs import succeeded
from cwpo.texts import prompt_order
from cwpo.types import Annotation, File, Job, Merge, ResultFormat, Truncation

JOB_ABOVE_ROWS = 5000
# Rows that are read at a time and sent by prompt, and those of a request.
_WINDOW_ROWS = 8192
_REQUEST_ROWS = 256
# The flag that would annotate the rows that were rejected for this reason.
_FLAG_THAT_KEEPS = {
    "too_long": "`--truncation prompt_left` of `cwpo annotate` or `cwpo jobs submit`"
}


@dataclass(frozen=True)
class AnnotatedFile:
    """A weighted dataset, a file or a folder, with the numbers of annotated and rejected rows.

    rejected: number of rejected rows for each reason (code of an ItemError); the rows are in the
    file at `errors_path(path)`.
    """

    path: Path
    rows: int
    rejected: Counter[str]

    def summary(self) -> str:
        """The numbers of annotated and rejected rows, in one or two lines."""
        lines = [f"{self.path}: {self.rows:,} rows"]
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
        return "\n".join(lines)


def annotate_file(
    client: Client,
    source: Path,
    output: Path,
    *,
    truncation: Truncation = "error",
    job_above: int = JOB_ABOVE_ROWS,
) -> AnnotatedFile:
    """Annotate a file of triplets, with progress on stderr; outputs appear only when complete.

    Args:
        source: .jsonl, .jsonl.gz or .parquet of triplets.
        output: .parquet or .jsonl to write, or a folder for a batch job's parts; rejected rows go
            to `errors_path(output)`.
        truncation: treatment of texts that are too long for the annotator: "error" rejects the
            row, "prompt_left" drops the oldest tokens of the prompt.
        job_above: files with more rows than this become a batch job; smaller ones are sent in
            requests.

    Raises: DatasetError for a file that cannot be read, or an output of another format;
        JobFailedError; APIError and ConnectionFailedError as the client does, and so
        ModelRevisionError if the service changes its annotator meanwhile.
    """
    format = result_format(output)
    with readable(source).open("rb") as stream:
        rows = count_rows(stream, file_format(source))
    if format is None or rows > job_above:
        merge: Merge = "never" if format is None else "auto"
        job = client.jobs.create(upload(client, source).id, truncation=truncation, merge=merge)
        return download_job(client, succeeded(follow_job(client, job.id)), output)
    return _annotate_by_requests(client, source, output, format, truncation, rows)


def upload(client: Client, source: Path) -> File:
    """Upload a file of triplets, with progress on stderr."""
    with Progress("upload", unit="bytes") as progress:
        return client.files.upload(source, progress=progress)


def follow_job(client: Client, job_id: str) -> Job:
    """Wait until the job has ended, showing its progress on stderr; returns the ended job."""
    job = client.jobs.get(job_id)
    with Progress(f"job {job.state}", unit="rows", done=job.progress.rows_done) as progress:
        for job in client.jobs.events(job_id):
            rows = job.progress
            work = "job waits for its annotator" if job.waiting else f"job {job.state}"
            progress.update(rows.rows_done, total=rows.rows_total, work=work)
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
    return AnnotatedFile(output, job.progress.rows_annotated, rejected)


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


def errors_path(output: Path) -> Path:
    """The file of rejected rows, such as `weighted.errors.jsonl` for `weighted.parquet`."""
    name = output.name if result_format(output) is None else output.stem
    return output.with_name(f"{name}.errors.jsonl")


def _annotate_by_requests(
    client: Client,
    source: Path,
    output: Path,
    format: ResultFormat,
    truncation: Truncation,
    rows: int,
) -> AnnotatedFile:
    annotated = 0
    rejected: Counter[str] = Counter()
    extra = _extra_columns(source)
    with (
        source.open("rb") as stream,
        partial_file(output) as sink,
        partial_file(errors_path(output)) as errors_sink,
        Progress("annotate", unit="rows", total=rows) as progress,
    ):
        errors = JsonlWriter(errors_sink)
        model = client.model()
        with weighted_writer(sink, format, model.ref(), extra) as writer:
            for window in _windows(read_triplets(stream, file_format(source)), _WINDOW_ROWS):
                kept, failed = _labelled(client, window, truncation, model.revision, progress)
                writer.write([_weighted(row, label, extra) for row, label in kept])
                errors.write(row.as_dict() for row in failed)
                annotated += len(kept)
                rejected.update(row.error.code for row in failed)
    return AnnotatedFile(output, annotated, rejected)


def _labelled(
    client: Client,
    window: Sequence[NumberedTriplet | RejectedRow],
    truncation: Truncation,
    revision: str,
    progress: Progress,
) -> tuple[list[tuple[NumberedTriplet, Annotation]], list[RejectedRow]]:
    """The rows with their labels, and those that the reader or the annotator rejected, in order."""
    good = [row for row in window if isinstance(row, NumberedTriplet)]
    failed = [row for row in window if isinstance(row, RejectedRow)]
    kept: list[tuple[NumberedTriplet, Annotation]] = []
    progress.advance(len(failed))
    # The annotator reads a prompt once for all rows of a request that have it.
    order = prompt_order([row.triplet.prompt for row in good])
    for at in range(0, len(good), _REQUEST_ROWS):
        rows = [good[place] for place in order[at : at + _REQUEST_ROWS]]
        triplets = [row.triplet for row in rows]
        answer = client.annotate(triplets, truncation=truncation, revision=revision)
        for row, label in zip(rows, answer.annotations, strict=True):
            if isinstance(label, Annotation):
                kept.append((row, label))
            else:
                failed.append(RejectedRow(row.row, label.id, label.error))
        progress.advance(len(rows))
    return sorted(kept, key=lambda item: item[0].row), sorted(failed, key=lambda row: row.row)


def _extra_columns(path: Path) -> list[Column]:
    with path.open("rb") as stream:
        return extra_columns(read_triplets(stream, file_format(path)))


def _weighted(row: NumberedTriplet, label: Annotation, extra: Sequence[Column]) -> dict[str, Any]:
    """A row of the dataset with all columns, those that its input row went without as null."""
    values = {column.name: row.extra.get(column.name) for column in extra}
    return weighted_row(row.triplet, label, values)


def _windows(
    rows: Iterable[NumberedTriplet | RejectedRow], size: int
) -> Iterator[list[NumberedTriplet | RejectedRow]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
