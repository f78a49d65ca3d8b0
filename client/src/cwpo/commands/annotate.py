"""`cwpo annotate`: a file of triplets in, a weighted dataset out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cwpo.annotated_file import JOB_ABOVE_ROWS, annotate_file
from cwpo.cli import AsJson
from cwpo.commands.service_command import (
    ColumnsFlag,
    MaxErrorFlag,
    PairsFlag,
    ServiceCommand,
    TruncationFlag,
)
from cwpo.datasets.naming import parsed_columns


class Annotate(ServiceCommand):
    """Annotate a file of triplets: label the preferred responses, each with a confidence.

    Writes the weighted dataset to OUTPUT. Rows that cannot be annotated go, with their number and
    the reason, to a file next to it whose name ends in .errors.jsonl. Exits with 1 if no row was
    annotated.

    Example:
        cwpo annotate triplets.jsonl -o weighted.parquet
    """

    input: CliPositionalArg[Path] = Field(
        description="File of triplets: .jsonl, .jsonl.gz, .parquet, .csv or .tsv; or a folder or a "
        "pattern (in quotes) of such files, which are annotated as one; or a dataset of the Hub, "
        "hub:owner/name@split."
    )
    output: Path = Field(
        description="File for the weighted dataset, .parquet or .jsonl; or a folder, for the parts "
        "of a batch job."
    )
    columns: ColumnsFlag = None
    truncation: TruncationFlag = "error"
    pairs: PairsFlag = None
    max_error: MaxErrorFlag = None
    job_above: int = Field(
        JOB_ABOVE_ROWS,
        ge=0,
        description="Number of rows above which a file becomes a batch job; a smaller file is sent "
        "in requests of 256 rows.",
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Annotate the file, and print the number of rows."""
        with self.client() as client:
            annotated = annotate_file(
                client,
                self.input,
                self.output,
                columns=parsed_columns(self.columns),
                truncation=self.truncation,
                pairs=self.pairs,
                max_error=self.max_error,
                job_above=self.job_above,
            )
        if self.json_:
            print(json.dumps(annotated.as_dict(), indent=2))
        else:
            print(annotated.summary(), file=sys.stderr)
        annotated.expect_labels()
