"""`cwpo quantize`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cwpo.cli import Command


class Quantize(Command):
    """Allow an annotator to be served in int8 on a CPU, where its labels stay the same.

    The labels of int8 and of float32 are compared on a sample of triplets. Where at least 99 %
    agree, OUTPUT becomes a copy whose annotator.json records that, and `--dtype int8` takes it.

    Example:
        cwpo quantize --annotator runs/annotator --calibration triplets.jsonl -o runs/annotator-int8
    """

    annotator: str = Field(description="annotator checkpoint: a folder, or a Hub id (owner/name)")
    calibration: Path = Field(
        description=".jsonl, .jsonl.gz or .parquet of triplets like those to be annotated"
    )
    output: Path = Field(description="folder to create")
    max_pairs: int = Field(1000, ge=1, description="triplets to compare, the first of the file")

    def cli_cmd(self) -> None:
        """Compare, and write the copy."""
        from cwpo_annotator.quantization import quantize

        check = quantize(self.annotator, self.calibration, self.output, self.max_pairs)
        print(
            f"{self.output}: {check.agreement:.2%} of {check.pairs:,} labels are those of float32"
        )
