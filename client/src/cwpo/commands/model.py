"""`cwpo model`: the annotator that a service hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import CliPositionalArg, CliSubCommand

from cwpo.cli import AsJson, Command
from cwpo.commands.service_command import ServiceCommand
from cwpo.datasets.sources import rows_in
from cwpo.errors import DatasetError, mistake_in
from cwpo.types import MAX_GOLDEN, GoldenTriplet, ModelInfo


class Show(ServiceCommand):
    """Print which annotator the service hosts.

    Example:
        cwpo model show --json
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Print the name and the revision, or everything."""
        with self.client() as client:
            model = client.model()
        print(_told(model, as_json=self.json_))


class Change(ServiceCommand):
    """Have a service load another annotator, and label by it from now on.

    It is loaded beside the present one and takes over between two batches; if it cannot be loaded,
    or labels a golden triplet otherwise, the present one stays, and the exit code is 1. The replica
    that answers is changed, which suits a service of one; to change a fleet, change its
    configuration. Needs a key with the scope `admin`.

    Example:
        cwpo model change runs/annotator-2 --golden golden.jsonl
    """

    annotator: CliPositionalArg[str] = Field(
        description="Checkpoint: a folder as the service sees it, or a Hub id."
    )
    golden: Path | None = Field(
        None,
        description="File of up to 256 triplets with the column `preferred`, a or b, which the "
        "annotator has to label so. By default, any annotator is taken that can be loaded.",
    )
    timeout: float = Field(
        1800, gt=0, description="Seconds to wait for the annotator to be loaded and checked."
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Change the annotator, and print which one serves."""
        golden = [] if self.golden is None else [*_golden(self.golden)]
        if len(golden) > MAX_GOLDEN:
            raise DatasetError(f"{self.golden}: {len(golden)} triplets, at most {MAX_GOLDEN} fit")
        with self.client() as client:
            changed = client.with_options(timeout=self.timeout).change_model(
                self.annotator, golden=golden
            )
        print(_told(changed, as_json=self.json_))


class Model(Command):
    """Show or change the annotator that a service hosts.

    Example:
        cwpo model show
    """

    show: CliSubCommand[Show]
    change: CliSubCommand[Change]


def _told(model: ModelInfo, *, as_json: bool) -> str:
    return model.model_dump_json(indent=2) if as_json else f"{model.name} {model.revision}"


def _golden(path: Path) -> Iterator[GoldenTriplet]:
    """The triplets of the file. Raises: DatasetError, which names the row."""
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    for number, row in rows_in(path):
        try:
            yield GoldenTriplet.model_validate(row)
        except ValidationError as error:
            raise DatasetError(f"{path}: row {number}: {mistake_in(error)}") from error
