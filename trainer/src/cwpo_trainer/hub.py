"""Repositories on the Hugging Face Hub, to which models and datasets are uploaded."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from cwpo.errors import ConfigError, CwpoError, first_line
from cwpo_annotator.checkpoint import base_name, is_adapter
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import README_NAME

Kind = Literal["model", "dataset"]
DATA_FOLDER = "data"


def check(repository: str, place: str) -> None:
    """Check that something can be uploaded to a repository, owner/name.

    Args:
        place: where the repository is named, such as a flag.
    Raises: ConfigError for another name, or where the login fails.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"{place}: a Hub id looks like owner/name, not {repository!r}")
    try:
        HfApi().whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{place}: the login at the Hub failed: {reason}; `hf auth login` first"
        ) from error


def push(folder: Path, repository: str | None) -> None:
    """Upload the finished folder of a model, where a repository is given.

    Raises: CwpoError if the upload to the Hub fails; the folder remains.
    """
    if repository is None or not process.is_main():
        return
    if is_adapter(folder) and Path(base := base_name(folder)).is_dir():
        print(
            f"{repository}: the adapter's base model is the folder {base} of this machine; others "
            "need it too, under the name in adapter_config.json (base_model_name_or_path)",
            file=sys.stderr,
        )
    _upload(folder, repository, "model", of=folder)


def push_dataset(files: Sequence[Path], card: str, repository: str) -> None:
    """Upload the files of a dataset, under their names in the folder `data`, and its card.

    Raises: CwpoError if the upload to the Hub fails.
    """
    with tempfile.TemporaryDirectory() as staged:
        folder = Path(staged)
        (folder / README_NAME).write_text(card)
        (folder / DATA_FOLDER).mkdir()
        for file in files:
            (folder / DATA_FOLDER / file.name).symlink_to(file.resolve())
        _upload(folder, repository, "dataset", of=files[0])


def _upload(folder: Path, repository: str, kind: Kind, *, of: Path) -> None:
    hub = HfApi()
    try:
        hub.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"Upload {of.name}",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        # The mistakes in a card that the Hub refuses follow in further lines.
        is_refused = isinstance(error, ValueError)
        reason = " ".join(str(error).split()) if is_refused else first_line(error)
        again = f"upload it with `hf upload {repository} {of}`"
        if kind == "dataset":
            again = "repeat the command"
        raise CwpoError(
            f"{of} is complete, but the upload to the Hub failed: {reason}; {again}"
        ) from error
