"""`cwpo jobs`: batch jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg, CliSubCommand
from rich.console import Console
from rich.table import Table

from cwpo.annotated_file import download_job, follow_job
from cwpo.cli import AsJson, Command
from cwpo.client import Client
from cwpo.commands.service_command import (
    ColumnsFlag,
    MaxErrorFlag,
    PairsFlag,
    ServiceCommand,
    TruncationFlag,
)
from cwpo.datasets.folder import result_format
from cwpo.datasets.naming import parsed_columns
from cwpo.datasets.triplets import is_triplet_file
from cwpo.errors import ConfigError, DatasetError
from cwpo.resources.jobs import succeeded
from cwpo.types import MAX_REJECTED_SHARE, Job, JobState, Merge, Priority, RejectedShare

_UNLIMITED_COLUMNS = 1000


class Submit(ServiceCommand):
    """Upload files of triplets and start a batch job.

    Several files are annotated as one, in the given order; of a folder, all files of triplets in
    it, in the order of their names. With --wait, exits with 1 if no row was annotated.

    Example:
        cwpo jobs submit triplets.jsonl.gz --wait -o weighted.parquet
    """

    input: CliPositionalArg[list[Path]] = Field(
        description="Files of triplets, .jsonl, .jsonl.gz, .parquet, .csv or .tsv; or folders or "
        "patterns (in quotes) of such files; or datasets of the Hub, hub:owner/name@split."
    )
    on_server: bool = Field(
        False,
        description="Read INPUT on the server, as a path below its --input-prefix, instead of "
        "uploading a local file.",
    )
    wait: bool = Field(
        False,
        description="Wait until the job has ended, showing its progress, and exit with 1 if it "
        "failed. --output implies this.",
    )
    output: Path | None = Field(
        None,
        description="File or folder for the weighted dataset, downloaded when the job has "
        "completed: .parquet, .jsonl, or a folder for its parts. Without it nothing is downloaded.",
    )
    max_rejected_share: RejectedShare = Field(
        MAX_REJECTED_SHARE,
        description="Share of invalid rows, 0 to 1, above which the job fails early; checked "
        "from row 1,000 on.",
    )
    priority: Priority = Field(
        "batch",
        description="Order among the jobs of the same API key: an interactive job goes before the "
        "batch jobs.",
    )
    columns: ColumnsFlag = None
    truncation: TruncationFlag = "error"
    pairs: PairsFlag = None
    max_error: MaxErrorFlag = None
    merge: Merge = Field(
        "auto",
        description="Form of the dataset: a folder of parts, and with `auto` also a single file "
        "unless it is large; `never` leaves the single file out.",
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Upload and submit, and wait for the job if that is wanted."""
        if self.output is not None:
            result_format(self.output)
        with self.client() as client:
            job = self._submitted(client)
            annotated = None
            if self.wait or self.output is not None:
                job = _ended(client, job.id, as_json=self.json_)
            else:
                _print_job(job, as_json=self.json_)
            if self.output is not None:
                annotated = download_job(client, job, self.output)
                print(annotated.summary(), file=sys.stderr)
        if annotated is not None:
            annotated.expect_labels()
        elif self.wait:
            _expect_labels(job)

    def _submitted(self, client: Client) -> Job:
        """The new job, for which the input is uploaded if it is here."""
        options: dict[str, Any] = {
            "truncation": self.truncation,
            "max_rejected_share": self.max_rejected_share,
            "priority": self.priority,
            "merge": self.merge,
            "pairs": self.pairs,
            "max_error": self.max_error,
        }
        columns = parsed_columns(self.columns)
        if not self.on_server:
            return client.jobs.submit(self.input, columns=columns, progress=True, **options).job
        if len(self.input) != 1:
            raise ConfigError(
                "--on-server: name one file or folder below the service's --input-prefix"
            )
        if columns:
            raise ConfigError("--columns: the columns of an input --on-server cannot be renamed")
        (path,) = self.input
        place: dict[str, Any] = {
            "input" if is_triplet_file(path.name) else "prefix": path.as_posix()
        }
        return client.jobs.create(**place, **options)


class ListJobs(ServiceCommand):
    """List jobs, newest first.

    Where there are more than --limit, the command that lists the next ones is on standard error.

    Example:
        cwpo jobs list --state running

        cwpo jobs list --all --json
    """

    state: JobState | None = Field(
        None, description="State of the jobs to list; by default jobs in any state."
    )
    created_after: datetime | None = Field(
        None,
        description="Earliest creation time of the jobs to list, such as 2026-11-21T09:00, in "
        "local time unless it has a time zone; by default any time.",
    )
    created_before: datetime | None = Field(
        None,
        description="Time before which the jobs to list were created, such as 2026-11-21T09:00, "
        "in local time unless it has a time zone; by default any time.",
    )
    limit: int = Field(
        20, ge=1, le=100, description="Maximum number of jobs to list, unless --all is given."
    )
    cursor: str | None = Field(
        None,
        description="Where to go on, as the listing before said; by default at the newest job.",
    )
    all: bool = Field(False, description="List all jobs, however many there are.")
    json_: AsJson = Field(
        False,
        alias="json",
        description="Print one JSON object per line for programs, instead of a table.",
    )

    @model_validator(mode="after")
    def _all_begin_at_the_newest(self) -> Self:
        if self.all and self.cursor is not None:
            raise ValueError("--all lists the jobs from the newest on: leave out --cursor")
        return self

    def cli_cmd(self) -> None:
        """Print a table."""
        with self.client() as client:
            jobs, cursor = self._listed(client)
            if self.json_:
                for job in jobs:
                    print(job.model_dump_json())
            else:
                _print_table(jobs)
        if cursor is not None:
            print(f"There are more: add --cursor {cursor}", file=sys.stderr)

    def _listed(self, client: Client) -> tuple[Iterable[Job], str | None]:
        """The jobs, and the cursor of those after them."""
        which: dict[str, Any] = {
            "state": self.state,
            "created_after": self.created_after,
            "created_before": self.created_before,
        }
        if self.all:
            return client.jobs.list_iter(**which), None
        page = client.jobs.list(**which, limit=self.limit, cursor=self.cursor)
        return page.jobs, page.next_cursor


class JobCommand(ServiceCommand):
    """Base of the commands about one job."""

    id: CliPositionalArg[str] = Field(description="Id of the job, as `cwpo jobs list` shows it.")


class Show(JobCommand):
    """Show one job.

    Example:
        cwpo jobs show job-0123 --json
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Print it."""
        with self.client() as client:
            _print_job(client.jobs.get(self.id), as_json=self.json_)


class Watch(JobCommand):
    """Follow a job until it ends; exit with 1 if it fails.

    Example:
        cwpo jobs watch job-0123
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Show its progress."""
        with self.client() as client:
            _ended(client, self.id, as_json=self.json_)


class Cancel(JobCommand):
    """Cancel a job; its finished rows can be downloaded, and the rest resumed later.

    Example:
        cwpo jobs cancel job-0123
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Send the request, and print the job."""
        with self.client() as client:
            _print_job(client.jobs.cancel(self.id), as_json=self.json_)


class Resume(JobCommand):
    """Resume a failed or cancelled job; finished rows are not annotated again.

    The job waits until the service hosts the annotator that it began with.

    Example:
        cwpo jobs resume job-0123
    """

    repin: bool = Field(
        False,
        description="Annotate all rows anew, by the annotator that the service hosts now.",
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Send the request, and print the job."""
        with self.client() as client:
            job = client.jobs.resume(self.id, repin=self.repin)
            _print_job(job, as_json=self.json_)


class Delete(JobCommand):
    """Delete an ended job with its results; its input file stays.

    Example:
        cwpo jobs delete job-0123
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Send the request, and print the job."""
        with self.client() as client:
            job = client.jobs.delete(self.id)
        if self.json_:
            _print_job(job, as_json=True)
        else:
            print(f"{job.id}  deleted")


class Download(JobCommand):
    """Download a job's weighted dataset, and its rejected rows to a file next to it.

    A folder gets the dataset's parts, several at a time, and dataset.json, which lists them. After
    an interruption the same command continues where it stopped.

    Example:
        cwpo jobs download job-0123 -o weighted/
    """

    output: Path = Field(
        description="File for the weighted dataset, .parquet or .jsonl; or a folder for its parts, "
        "the only form of a large dataset."
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Save both files."""
        result_format(self.output)
        with self.client() as client:
            annotated = download_job(client, client.jobs.get(self.id), self.output)
        if self.json_:
            print(json.dumps(annotated.as_dict(), indent=2))
        else:
            print(annotated.summary(), file=sys.stderr)


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


def _ended(client: Client, job_id: str, *, as_json: bool) -> Job:
    """The job, printed once it has ended. Raises: JobFailedError."""
    job = follow_job(client, job_id)
    _print_job(job, as_json=as_json)
    return succeeded(job)


def _print_job(job: Job, *, as_json: bool) -> None:
    """The job on stdout."""
    if as_json:
        print(job.model_dump_json(indent=2))
        return
    progress = job.progress
    total = "?" if progress.rows_total is None else f"{progress.rows_total:,}"
    print(f"{job.id}  {job.state}  {progress.rows_done:,} of {total} rows", end="")
    pairs = progress.pairs_annotated
    print("" if pairs is None else f"  {pairs:,} pairs", end="")
    print(f"  {progress.rows_failed:,} rejected" if progress.rows_failed else "")
    if job.waiting:
        since = job.waiting.since.astimezone()
        print(f"  waits for its annotator since {since:%Y-%m-%d %H:%M:%S}: {job.waiting.reason}")
    if job.error:
        print(f"  {job.error}")


def _print_table(jobs: Iterable[Job]) -> None:
    """The jobs on stdout."""
    table = Table("id", "state", "rows", "annotated", "rejected", "pairs", "created", box=None)
    for job in jobs:
        progress = job.progress
        table.add_row(
            job.id,
            job.state,
            str(progress.rows_total if progress.rows_total is not None else "?"),
            str(progress.rows_annotated),
            str(progress.rows_failed),
            "" if progress.pairs_annotated is None else str(progress.pairs_annotated),
            f"{job.created_at:%Y-%m-%d %H:%M:%S}",
        )
    # Where no terminal limits the width, nothing is cut off.
    Console(width=None if sys.stdout.isatty() else _UNLIMITED_COLUMNS).print(table)


def _expect_labels(job: Job) -> None:
    """Raises: DatasetError if no row of the job was annotated."""
    if not job.progress.rows_annotated:
        raise DatasetError(
            f"job {job.id} annotated none of its {job.progress.rows_total or 0:,} rows: "
            f"`cwpo jobs download {job.id} -o FILE` gets the reasons"
        )
