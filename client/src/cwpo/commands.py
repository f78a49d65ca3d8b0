"""`cwpo annotate` and `cwpo jobs`: the client's subcommands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliSubCommand
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cwpo import datasets
from cwpo.cli import Command
from cwpo.client import Client, partial_file, succeeded
from cwpo.columns import Column
from cwpo.datasets import JsonlWriter, NumberedTriplet, RejectedRow
from cwpo.errors import DatasetError
from cwpo.transport import ClientSettings
from cwpo.types import (
    MAX_REJECTED_SHARE,
    AnnotateResponse,
    Annotation,
    Job,
    JobState,
    RejectedShare,
    ResultFormat,
    Truncation,
)

_REQUEST_ROWS = 256


class ServiceCommand(Command):
    """Base of the commands that talk to a service."""

    url: str = Field(ClientSettings.model_fields["url"].default, description="of the service")
    api_key: str | None = Field(None, description="better set as CWPO_API_KEY than as a flag")

    def client(self) -> Client:
        """A client of the service."""
        return Client(self.url, self.api_key)


class Annotate(ServiceCommand):
    """Label a file of triplets with a confidence each.

    Writes the weighted dataset to OUTPUT, and rows that could not be annotated, with line number
    and reason, to a file beside it that ends in .errors.jsonl.

    Example:
        cwpo annotate triplets.jsonl -o weighted.parquet
    """

    input: CliPositionalArg[Path] = Field(description=".jsonl, .jsonl.gz or .parquet of triplets")
    output: Path = Field(description=".parquet or .jsonl")
    truncation: Truncation = Field(
        "error", description="of texts over the annotator's limit: refuse, or cut the prompt"
    )
    job_above: int = Field(
        5000, ge=0, description="inputs of more rows than this go as a batch job"
    )

    def cli_cmd(self) -> None:
        """Small inputs by requests, large ones by a job."""
        result_format(self.output)
        with self.client() as client:
            if _has_more_rows(self.input, self.job_above):
                job = client.jobs.create(
                    client.files.upload(self.input).id, truncation=self.truncation
                )
                finish(client, job, self.output)
            else:
                annotate_file(client, self.input, self.output, self.truncation)


class Submit(ServiceCommand):
    """Upload a file of triplets and start a batch job.

    Example:
        cwpo jobs submit triplets.jsonl.gz --wait -o weighted.parquet
    """

    input: CliPositionalArg[Path] = Field(description=".jsonl, .jsonl.gz or .parquet of triplets")
    on_server: bool = Field(
        False, description="INPUT is no file here but a path below the service's --input-prefix"
    )
    wait: bool = Field(False, description="until the job has ended; implied by --output")
    output: Path | None = Field(None, description=".parquet or .jsonl to download to")
    max_rejected_share: RejectedShare = Field(
        MAX_REJECTED_SHARE, description="fail early when more of the input's rows are invalid"
    )
    truncation: Truncation = Field(
        "error", description="of texts over the annotator's limit: refuse, or cut the prompt"
    )
    json_: bool = Field(False, alias="json", description="print the job as JSON")

    def cli_cmd(self) -> None:
        """Upload, submit, and wait where that is asked."""
        if self.output is not None:
            result_format(self.output)
        with self.client() as client:
            on_server = self.input.as_posix() if self.on_server else None
            job = client.jobs.create(
                None if on_server else client.files.upload(_readable(self.input)).id,
                input=on_server,
                truncation=self.truncation,
                max_rejected_share=self.max_rejected_share,
            )
            if self.output is not None:
                job = finish(client, job, self.output)
            elif self.wait:
                job = succeeded(follow(client, job.id))
        print_job(job, as_json=self.json_)


class ListJobs(ServiceCommand):
    """List jobs, newest first.

    Example:
        cwpo jobs list --state running
    """

    state: JobState | None = Field(None, description="only jobs in this state")
    created_after: datetime | None = Field(
        None, description="only jobs created then or later, such as 2026-11-21T09:00"
    )
    created_before: datetime | None = Field(None, description="only jobs created earlier than that")
    limit: int = Field(20, ge=1, le=100, description="at most so many")
    json_: bool = Field(False, alias="json", description="print one JSON object a line")

    def cli_cmd(self) -> None:
        """Print a table."""
        with self.client() as client:
            jobs = client.jobs.list(
                state=self.state,
                created_after=self.created_after,
                created_before=self.created_before,
                limit=self.limit,
            ).jobs
        if self.json_:
            for job in jobs:
                print(job.model_dump_json())
            return
        table = Table("id", "state", "rows", "annotated", "rejected", "created", box=None)
        for job in jobs:
            progress = job.progress
            table.add_row(
                job.id,
                job.state,
                str(progress.rows_total if progress.rows_total is not None else "?"),
                str(progress.rows_annotated),
                str(progress.rows_failed),
                f"{job.created_at:%Y-%m-%d %H:%M:%S}",
            )
        Console().print(table)


class JobCommand(ServiceCommand):
    """Base of the commands about one job."""

    id: CliPositionalArg[str] = Field(description="of the job")


class Show(JobCommand):
    """Show one job.

    Example:
        cwpo jobs show job-0123 --json
    """

    json_: bool = Field(False, alias="json", description="print the job as JSON")

    def cli_cmd(self) -> None:
        """Print it."""
        with self.client() as client:
            print_job(client.jobs.get(self.id), as_json=self.json_)


class Watch(JobCommand):
    """Follow a job until it ends; exits with 1 if it fails.

    Example:
        cwpo jobs watch job-0123
    """

    def cli_cmd(self) -> None:
        """Show its progress."""
        with self.client() as client:
            print_job(succeeded(follow(client, self.id)), as_json=False)


class Cancel(JobCommand):
    """Cancel a job; what it has finished can be downloaded, and the rest resumed.

    Example:
        cwpo jobs cancel job-0123
    """

    def cli_cmd(self) -> None:
        """Ask for it."""
        with self.client() as client:
            print_job(client.jobs.cancel(self.id), as_json=False)


class Resume(JobCommand):
    """Go on with a failed or cancelled job; what was finished is not done again.

    Example:
        cwpo jobs resume job-0123
    """

    def cli_cmd(self) -> None:
        """Ask for it."""
        with self.client() as client:
            print_job(client.jobs.resume(self.id), as_json=False)


class Delete(JobCommand):
    """Delete an ended job with its results; its input file stays.

    Example:
        cwpo jobs delete job-0123
    """

    def cli_cmd(self) -> None:
        """Ask for it."""
        with self.client() as client:
            print(f"{client.jobs.delete(self.id).id}  deleted")


class Download(JobCommand):
    """Download a job's weighted dataset, and its rejected rows beside it.

    Example:
        cwpo jobs download job-0123 -o weighted.parquet
    """

    output: Path = Field(description=".parquet or .jsonl")

    def cli_cmd(self) -> None:
        """Save both files."""
        result_format(self.output)
        with self.client() as client:
            download(client, client.jobs.get(self.id), self.output)


class Jobs(Command):
    """Submit, follow and download batch jobs.

    Example:
        cwpo jobs submit triplets.jsonl --wait -o weighted.parquet
    """

    submit: CliSubCommand[Submit]
    list: CliSubCommand[ListJobs]
    show: CliSubCommand[Show]
    watch: CliSubCommand[Watch]
    cancel: CliSubCommand[Cancel]
    resume: CliSubCommand[Resume]
    download: CliSubCommand[Download]
    delete: CliSubCommand[Delete]


def result_format(path: Path) -> ResultFormat:
    """The format that an output's name says. Raises: DatasetError for any other name."""
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix == ".jsonl":
        return "jsonl"
    raise DatasetError(f"{path}: an output is a .parquet or a .jsonl file")


def errors_path(output: Path) -> Path:
    """Where the rejected rows of a dataset go."""
    return output.with_suffix(".errors.jsonl")


def annotate_file(client: Client, source: Path, output: Path, truncation: Truncation) -> None:
    """Annotate a file by requests; both outputs appear only when complete."""
    annotated = rejected = 0
    extra = _extra_columns(source)
    with (
        _readable(source).open("rb") as stream,
        partial_file(output) as sink,
        partial_file(errors_path(output)) as errors_sink,
        _bar() as bar,
    ):
        task = bar.add_task("annotating", total=None)
        errors = JsonlWriter(errors_sink)
        model = client.model()
        with datasets.weighted_writer(sink, result_format(output), model.ref(), extra) as writer:
            rows = datasets.read_triplets(stream, datasets.file_format(source))
            for batch in _batches(rows, _REQUEST_ROWS):
                good = [row for row in batch if isinstance(row, NumberedTriplet)]
                answers = _ask(client, good, truncation)
                kept, failed = split_answers(good, answers)
                failed += [row for row in batch if isinstance(row, RejectedRow)]
                writer.write([_weighted(row, label, extra) for row, label in kept])
                errors.write(row.as_dict() for row in sorted(failed, key=lambda row: row.row))
                annotated += len(kept)
                rejected += len(failed)
                bar.advance(task, len(batch))
    _report(output, annotated, rejected)


def split_answers(
    rows: list[NumberedTriplet], answers: AnnotateResponse | None
) -> tuple[list[tuple[NumberedTriplet, Annotation]], list[RejectedRow]]:
    """The annotated triplets, and those that the annotator refused, each in order."""
    kept: list[tuple[NumberedTriplet, Annotation]] = []
    failed: list[RejectedRow] = []
    for row, answer in zip(rows, answers.annotations if answers else [], strict=True):
        if isinstance(answer, Annotation):
            kept.append((row, answer))
        else:
            failed.append(RejectedRow(row.row, answer.id, answer.error))
    return kept, failed


def finish(client: Client, job: Job, output: Path) -> Job:
    """Follow the job to its end and download it. Raises: JobFailedError."""
    job = succeeded(follow(client, job.id))
    download(client, job, output)
    return job


def download(client: Client, job: Job, output: Path) -> None:
    """Save a job's dataset, and its rejected rows beside it."""
    client.jobs.download_errors(job.id, errors_path(output))
    client.jobs.download(job.id, output, format=result_format(output))
    _report(output, job.progress.rows_annotated, job.progress.rows_failed)


def follow(client: Client, job_id: str) -> Job:
    """The job when it has ended, its progress shown until then."""
    with _bar() as bar:
        task = bar.add_task("submitted", total=None)
        for job in client.jobs.watch(job_id):
            progress = job.progress
            bar.update(
                task,
                description=job.state,
                completed=progress.rows_done,
                total=progress.rows_total,
            )
    return job


def print_job(job: Job, *, as_json: bool) -> None:
    """The job on stdout."""
    if as_json:
        print(job.model_dump_json(indent=2))
        return
    progress = job.progress
    total = "?" if progress.rows_total is None else f"{progress.rows_total:,}"
    print(f"{job.id}  {job.state}  {progress.rows_done:,} of {total} rows", end="")
    print(f"  {progress.rows_failed:,} rejected" if progress.rows_failed else "")
    if job.error:
        print(f"  {job.error}")


def _ask(
    client: Client, rows: list[NumberedTriplet], truncation: Truncation
) -> AnnotateResponse | None:
    if not rows:
        return None
    return client.annotate([row.triplet for row in rows], truncation=truncation)


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    return path


def _has_more_rows(path: Path, limit: int) -> bool:
    with _readable(path).open("rb") as stream:
        rows = datasets.read_rows(stream, datasets.file_format(path))
        return next(islice(rows, limit, None), None) is not None


def _extra_columns(path: Path) -> list[Column]:
    with _readable(path).open("rb") as stream:
        return datasets.extra_columns(datasets.read_triplets(stream, datasets.file_format(path)))


def _weighted(row: NumberedTriplet, label: Annotation, extra: Sequence[Column]) -> dict[str, Any]:
    """A row of the dataset with all columns, those that its input row went without as null."""
    beside = {column.name: row.extra.get(column.name) for column in extra}
    return datasets.weighted_row(row.triplet, label, beside)


def _batches(
    rows: Iterable[NumberedTriplet | RejectedRow], size: int
) -> Iterator[list[NumberedTriplet | RejectedRow]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _report(output: Path, annotated: int, rejected: int) -> None:
    console = Console(stderr=True)
    console.print(f"{output}: {annotated:,} rows", highlight=False)
    if rejected:
        console.print(f"{errors_path(output)}: {rejected:,} rows rejected", highlight=False)
