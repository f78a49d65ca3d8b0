"""`cwpo jobs`: batch jobs."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliSubCommand
from rich.console import Console
from rich.table import Table

from cwpo.annotated_file import AnnotatedFile, download_job, follow_job
from cwpo.cli import Command
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

JobAsJson = Annotated[
    bool, Field(alias="json", description="Print the job as JSON instead of a line of text.")
]


class Submit(ServiceCommand):
    """Upload files of triplets and start a batch job.

    Several files are annotated as one, in the given order; of a folder, all files of triplets in
    it, in the order of their names. With --wait, exits with 1 if no row was annotated.

    Example:
        cwpo jobs submit triplets.jsonl.gz --wait -o weighted.parquet
    """

    input: CliPositionalArg[list[Path]] = Field(
        description="Files of triplets, .jsonl, .jsonl.gz, .parquet, .csv or .tsv; or folders or "
        "patterns (in quotes) of such files."
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
    json_: JobAsJson = False

    def cli_cmd(self) -> None:
        """Upload and submit, and wait for the job if that is wanted."""
        if self.output is not None:
            result_format(self.output)
        with self.client() as client:
            job = self._submitted(client)
            if self.wait or self.output is not None:
                job = succeeded(follow_job(client, job.id))
            annotated = None if self.output is None else _download(client, job, self.output)
        _print_job(job, as_json=self.json_)
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

    Example:
        cwpo jobs list --state running
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
    limit: int = Field(20, ge=1, le=100, description="Maximum number of jobs to list.")
    json_: bool = Field(
        False, alias="json", description="Print one JSON object per line instead of a table."
    )

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
        Console().print(table)


class JobCommand(ServiceCommand):
    """Base of the commands about one job."""

    id: CliPositionalArg[str] = Field(description="Id of the job, as `cwpo jobs list` shows it.")


class Show(JobCommand):
    """Show one job.

    Example:
        cwpo jobs show job-0123 --json
    """

    json_: JobAsJson = False

    def cli_cmd(self) -> None:
        """Print it."""
        with self.client() as client:
            _print_job(client.jobs.get(self.id), as_json=self.json_)


class Watch(JobCommand):
    """Follow a job until it ends; exit with 1 if it fails.

    Example:
        cwpo jobs watch job-0123
    """

    def cli_cmd(self) -> None:
        """Show its progress."""
        with self.client() as client:
            _print_job(succeeded(follow_job(client, self.id)), as_json=False)


class Cancel(JobCommand):
    """Cancel a job; its finished rows can be downloaded, and the rest resumed later.

    Example:
        cwpo jobs cancel job-0123
    """

    def cli_cmd(self) -> None:
        """Send the request, and print the job."""
        with self.client() as client:
            _print_job(client.jobs.cancel(self.id), as_json=False)


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

    def cli_cmd(self) -> None:
        """Send the request, and print the job."""
        with self.client() as client:
            _print_job(client.jobs.resume(self.id, repin=self.repin), as_json=False)


class Delete(JobCommand):
    """Delete an ended job with its results; its input file stays.

    Example:
        cwpo jobs delete job-0123
    """

    def cli_cmd(self) -> None:
        """Send the request, and print the job."""
        with self.client() as client:
            print(f"{client.jobs.delete(self.id).id}  deleted")


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

    def cli_cmd(self) -> None:
        """Save both files."""
        result_format(self.output)
        with self.client() as client:
            _download(client, client.jobs.get(self.id), self.output)


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


def _expect_labels(job: Job) -> None:
    """Raises: DatasetError if no row of the job was annotated."""
    if not job.progress.rows_annotated:
        raise DatasetError(
            f"job {job.id} annotated none of its {job.progress.rows_total or 0:,} rows: "
            f"`cwpo jobs download {job.id} -o FILE` gets the reasons"
        )


def _download(client: Client, job: Job, output: Path) -> AnnotatedFile:
    annotated = download_job(client, job, output)
    print(annotated.summary(), file=sys.stderr)
    return annotated
