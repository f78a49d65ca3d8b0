"""Datasets of the Hugging Face Hub as inputs: hub:owner/name@split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cwpo.errors import ConfigError, DatasetError, first_line
from cwpo.partial_file import partial_file

PREFIX = "hub:"
_SOURCE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+))?(?:@(?P<split>.+))?")


def is_hub(source: object) -> bool:
    """Whether an input names a dataset of the Hub."""
    return str(source).startswith(PREFIX) if isinstance(source, str | Path) else False


def rows(source: str) -> Iterator[dict[str, Any]]:
    """Each row of the dataset, which `datasets` keeps in its cache. Raises: as `file`."""
    return iter(_loaded(source))


def file(source: str) -> Path:
    """A Parquet file of the dataset, which is kept beside the cache of `datasets`.

    Args:
        source: hub:owner/name, with a folder of the repository behind it (/folder) if need be, and
            a split (@validation, or @train[:1000]); by default train.
    Raises: ConfigError without the package datasets, or for a source of another form; DatasetError
        for a dataset that cannot be loaded.
    """
    dataset = _loaded(source)
    from datasets import config

    name = re.sub(r"[^\w.-]+", "-", source.removeprefix(PREFIX))
    path = Path(config.HF_DATASETS_CACHE) / "cwpo" / f"{name}-{dataset._fingerprint}.parquet"
    if not path.is_file():
        with partial_file(path) as out:
            dataset.to_parquet(out)
    return path


def _loaded(source: str) -> Any:
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise ConfigError(f"{source}: a dataset of the Hub is hub:owner/name@split")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{source}: the package datasets is needed: pip install 'cwpo[datasets]'"
        ) from error
    split = found["split"] or "train"
    try:
        return load_dataset(found["name"], data_dir=found["folder"], split=split)
    except Exception as error:  # It raises whatever its loaders and the network raise.
        raise DatasetError(
            f"{source}: the dataset cannot be loaded from the Hub: {first_line(error)}"
        ) from error
