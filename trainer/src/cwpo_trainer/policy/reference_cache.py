"""Reference log-probabilities on disk, for all runs that read the same pairs by the same reference.

    FOLDER/CACHEDIR.TAG
    FOLDER/<fingerprint of the reference>/<SHA-256 of the file>.parquet

A part has the columns `pair` (the key of its token ids), `chosen` and `rejected`. It appears when
it is complete and never changes, so that several runs may read and write at a time. A part whose
content is not what its name says, as after a crash of the machine, is ignored.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor

from cwpo.errors import ConfigError
from cwpo.partial_file import partial_file

PairLogProbs = tuple[float, float]
"""Of the chosen and the rejected response of a pair, each a float32."""

# To raise when the same weights and tokens come to give other log-probabilities.
_FORMAT = 1
# A run that is killed loses at most so many pairs.
_PART = 4096
# Of an adapter's configuration: where its base model is, and how it was or is trained.
_OF_TRAINING = {"base_model_name_or_path", "inference_mode", "lora_dropout"}
_TAG_NAME = "CACHEDIR.TAG"
# Its first line tells backups to leave the folder out; see https://bford.info/cachedir/.
_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# The reference cache of cwpo align. It can be removed at any time.
"""
_SCHEMA = pa.schema([("pair", pa.binary(32)), ("chosen", pa.float32()), ("rejected", pa.float32())])


class ReferenceCache:
    """The pairs that one reference has read.

    Args:
        folder: of all references; created if need be.
        reference: its `reference_fingerprint`.
    Raises: ConfigError for a folder that holds something else, or that cannot be written.
    """

    def __init__(self, folder: Path, reference: str) -> None:
        check(folder)
        self._folder = folder / reference
        self._unwritten: dict[bytes, PairLogProbs] = {}
        try:
            # The tag before all else: what stands without it is taken for something else.
            if not _is_tagged(folder):
                with partial_file(folder / _TAG_NAME) as out:
                    out.write(_TAG)
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder}: the reference cache cannot be written: {error.strerror}"
            ) from error

    def read(self, pairs: Collection[bytes]) -> dict[bytes, PairLogProbs]:
        """Those of the pairs that are there, by their keys."""
        wanted = set(pairs)
        found: dict[bytes, PairLogProbs] = {}
        for table in self._parts():
            columns = (table[name].to_pylist() for name in _SCHEMA.names)
            for pair, *log_probs in zip(*columns, strict=True):
                if pair in wanted:
                    found[pair] = (log_probs[0], log_probs[1])
        return found

    def add(self, log_probs: Mapping[bytes, PairLogProbs]) -> None:
        """Keep pairs by their keys, and write a part once there are enough for one."""
        self._unwritten.update(log_probs)
        if len(self._unwritten) >= _PART:
            self.write()

    def write(self) -> None:
        """Write the pairs that are not written yet.

        A disk that is full costs a later run its time, and this one nothing. What is NaN or
        infinite is left out, so that it does not outlive its cause.
        """
        rows = [
            (pair, *log_probs)
            for pair, log_probs in self._unwritten.items()
            if np.isfinite(log_probs).all()
        ]
        self._unwritten.clear()
        if not rows:
            return
        part = io.BytesIO()
        columns = [list(column) for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(columns, schema=_SCHEMA), part)
        content = part.getvalue()
        try:
            with partial_file(self._folder / f"{_sha256(content)}.parquet") as out:
                out.write(content)
        except OSError as error:
            lost = f"{len(rows):,} pairs are not kept in the reference cache"
            print(f"{lost}: {self._folder}: {error.strerror}", file=sys.stderr)

    def _parts(self) -> Iterator[pa.Table]:
        for path in sorted(self._folder.glob("*.parquet")):
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if _sha256(content) == path.stem:
                yield pq.read_table(pa.BufferReader(content))


def check(folder: Path) -> None:
    """Raises: ConfigError for a path that is no folder, or a folder that holds something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: a file, not a folder for a reference cache")
    # Hidden is the tag that another run writes at this moment; hence also the order of the two.
    content = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if content and not _is_tagged(folder):
        raise ConfigError(
            f"{folder}: not a reference cache: it holds {min(content)}; name a new or an empty "
            "folder"
        )


def _is_tagged(folder: Path) -> bool:
    tag = folder / _TAG_NAME
    return tag.is_file() and tag.read_bytes() == _TAG


def pair_keys(dataset: Dataset) -> list[bytes]:
    """What identifies each pair: the SHA-256 of its token ids.

    Args:
        dataset: with the columns prompt_ids, chosen_ids and rejected_ids.
    """
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format(None)
    return [
        _pair_key(*texts)
        for rows in columns.iter(batch_size=1024)
        for texts in zip(*rows.values(), strict=True)
    ]


def _pair_key(*texts: list[int]) -> bytes:
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return digest.digest()


def reference_fingerprint(model: Any, *, trained_adapter: str | None, **reading: Any) -> str:
    """What identifies a reference: 64 hex digits of its weights, configuration and reading.

    Of a model that is sharded by FSDP2, all ranks have to ask.

    Args:
        trained_adapter: the adapter that is switched off in `model` when it is the reference.
        reading: all else, of plain values, that log-probabilities of the same tokens depend on.
    """
    digest = hashlib.sha256()
    # Without their names, which adapters change, but in the order of these.
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and trained_adapter not in name.split("."):
            _add(digest, tensor)
    # A model that adapters were put into has them too, without being a PeftModel.
    adapters = getattr(model, "peft_config", {})
    config = model.config.to_dict()
    # Where the folder of the model is.
    config.pop("_name_or_path", None)
    described = {
        "format": _FORMAT,
        "config": config,
        "adapters": {
            name: _without(config.to_dict(), _OF_TRAINING)
            for name, config in adapters.items()
            if name != trained_adapter
        },
        **reading,
    }
    digest.update(json.dumps(described, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    digest.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
    plain = whole.detach().cpu().contiguous().flatten()
    digest.update(plain.view(torch.uint8).numpy().data)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
