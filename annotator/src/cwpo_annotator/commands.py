"""`cwpo quantize` and `cwpo fetch`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cwpo.cli import Command


class Quantize(Command):
    """Write a copy of an annotator for int8 on a CPU, if its labels stay the same.

    Compares the labels of int8 and float32 on a sample of triplets. If at least 99 % agree, writes
    a copy of the annotator whose annotator.json records the agreement. `cwpo serve --dtype int8`
    accepts only such copies.

    Example:
        cwpo quantize --annotator runs/annotator --calibration triplets.jsonl -o runs/annotator-int8
    """

    annotator: str = Field(description="Folder or Hub id (owner/name) of the annotator to copy.")
    calibration: Path = Field(
        description="File of triplets like those to be annotated: .jsonl, .jsonl.gz or .parquet. "
        "No labels are needed."
    )
    output: Path = Field(description="Folder to create for the copy of the annotator.")
    max_pairs: int = Field(
        1000,
        ge=1,
        description="Maximum number of triplets to compare, from the start of --calibration.",
    )

    def cli_cmd(self) -> None:
        """Compare the labels, and write the copy."""
        from cwpo_annotator.quantization import quantize

        check = quantize(self.annotator, self.calibration, self.output, self.max_pairs)
        print(
            f"{self.output}: int8 gives the same label as float32 to {check.agreement:.2%} of "
            f"{check.pairs:,} triplets"
        )


class Fetch(Command):
    """Copy an annotator from an object store or the Hub into a folder, and check which it is.

    The folder appears once it is complete; if it is there, it is checked and left as it is. An
    annotator of another revision is not kept.

    Example:
        cwpo fetch s3://bucket/annotator /models/annotator --revision 2990d7939581
    """

    source: CliPositionalArg[str] = Field(
        description="URL of a folder (s3://bucket/annotator), Hub id (owner/name), or folder."
    )
    folder: CliPositionalArg[Path] = Field(description="Folder to create.")
    revision: str | None = Field(
        None,
        pattern="^[0-9a-f]{12}$",
        description="Revision that the annotator has to have, as `cwpo model show` and every "
        "dataset name it; by default any.",
    )

    def cli_cmd(self) -> None:
        """Copy and check."""
        from cwpo_annotator.fetched import fetch

        print(f"{self.folder}: {fetch(self.source, self.folder, revision=self.revision)}")
