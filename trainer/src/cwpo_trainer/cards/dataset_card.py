"""The card of a weighted dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import DatasetCardData

from cwpo.certificates import described
from cwpo.errors import DatasetError
from cwpo.types import Certificate, ModelRef
from cwpo_trainer.cards.model_card import Facts, rendered
from cwpo_trainer.data.rows import file_rows, triplet_in
from cwpo_trainer.data.unused_rows import BadRowError, NumberedRow
from cwpo_trainer.data.weighted import confidence_in, read_annotator, read_certificate
from cwpo_trainer.hub import DATA_FOLDER

_BINS = 10
# By the Hub's names.
_SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M"}
_LARGER = "n>10M"
_COLUMNS = {
    "id": "of the triplet",
    "prompt": "text, or chat messages",
    "chosen": "the response that the annotator prefers; of a tie, response a",
    "rejected": "the other response",
    "confidence": "tanh(|s_a - s_b| / 2) in [0, 1], of the scores of both responses",
    "calibrated_confidence": "the same at the annotator's calibration temperature",
    "score_chosen": "the annotator's score of the chosen response",
    "score_rejected": "that of the rejected one",
    "preferred": "which response of the triplet was chosen: a, b, or tie",
    "certified": "whether the annotator's certificate covers the label",
    "prompt_pairs": "number of pairs of the same prompt",
}


@dataclass
class Figures:
    """What a card says of the rows of a weighted dataset.

    bins: how many rows have a confidence in each tenth of [0, 1], from the lowest.
    """

    rows: int = 0
    ties: int = 0
    confidence: float = 0.0
    bins: list[int] = field(default_factory=lambda: [0] * _BINS)
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[NumberedRow], path: Path) -> Figures:
        """Of all rows. Raises: DatasetError naming the first that is no weighted pair."""
        figures = cls()
        for number, row in rows:
            try:
                triplet_in(number, row)
                confidence = confidence_in(row)
            except BadRowError as error:
                raise DatasetError(f"{path}: row {number}: {error}") from error
            figures.rows += 1
            figures.ties += isinstance(row, dict) and row.get("preferred") == "tie"
            figures.confidence += confidence
            figures.bins[min(int(confidence * _BINS), _BINS - 1)] += 1
            if not figures.columns and isinstance(row, dict):
                figures.columns = tuple(row)
        if not figures.rows:
            raise DatasetError(f"{path}: holds no pairs")
        return figures


def dataset_card(data: Path, files: Sequence[Path], repository: str, licence: str | None) -> str:
    """The card of a weighted dataset that becomes a repository of the Hub.

    Args:
        data: the file, or the folder.
        files: all of its files.
        licence: by the Hub's name; None leaves it to be filled in.
    Raises: DatasetError for a file that is no weighted dataset.
    """
    figures = Figures.of(file_rows(data), data)
    place = f"{DATA_FOLDER}/{files[0].name if len(files) == 1 else '*.parquet'}"
    metadata = DatasetCardData(
        license=licence,
        pretty_name=repository.partition("/")[2],
        size_categories=next((name for n, name in _SIZES.items() if figures.rows < n), _LARGER),
        tags=["cwpo", "preferences", "dpo", "trl"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": place}]}],
    )
    return rendered(
        "dataset.md",
        metadata,
        repository=repository,
        columns={f"`{name}`": _COLUMNS.get(name, "of the input") for name in figures.columns},
        figures=_facts(figures, read_annotator(data), read_certificate(data)),
        bins=_bins(figures),
    )


def _facts(figures: Figures, annotator: ModelRef | None, certificate: Certificate | None) -> Facts:
    by = "not named by the files"
    if annotator is not None:
        by = f"`{annotator.name}`, revision `{annotator.revision}`"
    return {
        "pairs": f"{figures.rows:,}",
        "ties, of weight 0": f"{figures.ties:,}",
        "annotator": by,
        "certificate": described(certificate) if certificate is not None else None,
        "mean confidence": figures.confidence / figures.rows,
    }


def _bins(figures: Figures) -> Facts:
    """The share of pairs by tenths of confidence, the most confident first."""
    return {
        f"{at / _BINS:g} to {(at + 1) / _BINS:g}": f"{count / figures.rows:.1%}"
        for at, count in reversed([*enumerate(figures.bins)])
    }
