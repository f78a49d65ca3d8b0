"""`cwpo review`: the uncertain rows of a weighted dataset go to people, and come back as labels."""

from __future__ import annotations

from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import CliPositionalArg, CliSubCommand

from cwpo.cli import AsJson, Command
from cwpo.commands.service_command import ServiceCommand
from cwpo.datasets.folder import dataset_files
from cwpo.datasets.sources import rows_in
from cwpo.datasets.weighted import JsonlWriter
from cwpo.errors import CwpoError, DatasetError
from cwpo.partial_file import partial_file
from cwpo.reviews.agreement import Agreement, ReviewReport, merged
from cwpo.reviews.forms import ReviewForm, read_answers, write_pairs
from cwpo.reviews.pairs import ReviewPair
from cwpo.reviews.selection import pool_size, sampled, spread


class Export(ServiceCommand):
    """Write the uncertain rows of a weighted dataset as pairs for people to label.

    The rows are spread over the data: of up to 2,000 uncertain ones, those come first that are the
    most unlike each other, by the embeddings of the annotator that the service hosts.

    Example:
        cwpo review export weighted.parquet --below 0.1 --most 500 --format argilla -o pairs.json
    """

    dataset: CliPositionalArg[Path] = Field(
        description="Weighted dataset: .parquet, .jsonl, or a folder of Parquet files."
    )
    output: Path = Field(description="File for the pairs: .csv for CSV, .json for the others.")
    below: float = Field(
        0.1, gt=0, le=1, description="Confidence, 0 to 1, below which a row is uncertain."
    )
    most: int = Field(500, ge=1, description="Largest number of pairs.")
    format: ReviewForm = Field("csv", description="Tool that the pairs are for.")
    at_random: bool = Field(
        False, description="Draw the rows at random instead, which needs no service."
    )

    def cli_cmd(self) -> None:
        """Select the pairs and write them."""
        suffix = ".csv" if self.format == "csv" else ".json"
        if self.output.suffix != suffix:
            raise DatasetError(f"{self.output}: pairs of the format {self.format} are a {suffix}")
        found = 0

        def counted() -> Iterator[ReviewPair]:
            nonlocal found
            for pair in _pairs(self.dataset):
                if pair.confidence is not None and pair.confidence < self.below:
                    found += 1
                    yield pair

        drawn = sampled(counted(), self.most if self.at_random else pool_size(self.most))
        if not drawn:
            raise DatasetError(f"{self.dataset}: no row has a confidence below {self.below:g}")
        pairs = drawn if self.at_random else self._spread(drawn)
        with (
            partial_file(self.output) as out,
            TextIOWrapper(out, encoding="utf-8", newline="") as sink,
        ):
            write_pairs(pairs, self.format, sink)
        how = "drawn at random from" if self.at_random else "spread over"
        uncertain = f"the {found:,} with a confidence below {self.below:g}"
        print(f"{self.output}: {len(pairs):,} rows, {how} {uncertain}")

    def _spread(self, drawn: list[ReviewPair]) -> list[ReviewPair]:
        """Those of them that are unlike each other. Raises: CwpoError without embeddings."""
        triplets = [pair.triplet for pair in drawn]
        try:
            with self.client() as client:
                found = client.embed(triplets, truncation="prompt_left", progress=True)
        except CwpoError as error:
            raise CwpoError(
                f"{error}; the rows are spread by what a service embeds: name one by --url, or "
                "draw them by --at-random"
            ) from error
        embeddings = [getattr(each, "embedding", None) for each in found.embeddings]
        return spread(drawn, embeddings, self.most)


class Import(Command):
    """Merge people's answers into labelled pairs, and say how far they and the annotator agree.

    A pair gets the label that most of its reviewers gave it; ties and split votes are left out.
    `cwpo train-annotator --data` reads the output.

    Example:
        cwpo review import answers.csv --labelled labelled.jsonl -o more.jsonl
    """

    answers: CliPositionalArg[list[Path]] = Field(
        description="Files of answers: the .csv of `cwpo review export` with its column preferred "
        "filled in (a, b or tie), an export of Argilla or Label Studio (.json), or the answers of "
        "the service's page (.jsonl)."
    )
    output: Path = Field(description="File for the labelled pairs, .jsonl.")
    labelled: Path | None = Field(
        None, description="Labelled pairs that come first in the output: .jsonl or .parquet."
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Write the labelled pairs, and print the report."""
        if self.output.suffix != ".jsonl":
            raise DatasetError(f"{self.output}: labelled pairs are a .jsonl file")
        answers = [answer for path in self.answers for answer in read_answers(path)]
        if not answers:
            raise DatasetError(f"{', '.join(map(str, self.answers))}: nobody has answered yet")
        pairs, report = merged(answers)
        earlier = [] if self.labelled is None else [*_rows(self.labelled)]
        lines = [*earlier, *(pair.model_dump(mode="json") for pair in pairs)]
        # It may take the place of --labelled, which must not be lost on the way.
        with partial_file(self.output) as out:
            JsonlWriter(out).write(lines)
        if self.json_:
            print(report.model_dump_json(indent=2))
            return
        print(f"{self.output}: {len(lines):,} labelled pairs, {len(pairs):,} of them from review")
        print(*_lines(report), sep="\n")


class Review(Command):
    """Give uncertain rows to people, and take their answers back.

    Example:
        cwpo review export weighted.parquet --below 0.1 --most 500 -o pairs.csv
    """

    export: CliSubCommand[Export]
    import_: CliSubCommand[Import] = Field(alias="import")


def _pairs(dataset: Path) -> Iterator[ReviewPair]:
    """The rows of a weighted dataset as pairs. Raises: DatasetError."""
    if not dataset.exists():
        raise DatasetError(f"{dataset}: no such file or folder")
    for path in dataset_files(dataset):
        for number, row in rows_in(path):
            try:
                if isinstance(row, str):
                    raise KeyError
                yield ReviewPair.of_row(row)
            except (KeyError, TypeError, ValidationError):
                raise DatasetError(
                    f"{path}: row {number} is no row of a weighted dataset, as `cwpo annotate` "
                    "writes it"
                ) from None


def _rows(path: Path) -> Iterator[dict[str, object]]:
    """The rows of labelled pairs, as they are. Raises: DatasetError."""
    if not path.exists():
        raise DatasetError(f"{path}: no such file")
    for number, row in rows_in(path):
        if isinstance(row, str):
            raise DatasetError(f"{path}: row {number}: {row}")
        yield row


def _lines(report: ReviewReport) -> Iterator[str]:
    yield (
        f"{report.answers:,} answers: {report.labelled:,} pairs with a label, "
        f"{report.ties:,} ties and {report.split:,} split votes left out"
    )
    if report.between_reviewers.compared:
        alpha = "" if report.alpha is None else f", Krippendorff's alpha {report.alpha:.2f}"
        yield f"reviewers agree on {_share(report.between_reviewers)} pairs of answers{alpha}"
    if report.with_annotator.compared:
        yield f"the labels agree with the annotator's on {_share(report.with_annotator)} pairs"
        if len(report.reviewers) > 1:
            for name, agreement in report.reviewers.items():
                yield f"  {name}: {_share(agreement)} answers"


def _share(agreement: Agreement) -> str:
    share = "–" if agreement.share is None else f"{agreement.share:.1%}"
    return f"{share} of {agreement.compared:,}"
