"""`cwpo data`: labelled pairs split, poisoned, mixed, or labelled anew.

Inputs are read twice, once to count and once to write, and never held as a whole, but by `split`.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import ConfigError, DatasetError
from cwpo_trainer import weights
from cwpo_trainer.data.labelled import LabelledPair, labelled_pairs, read_pairs
from cwpo_trainer.data.labelled_file import labelled_row, write_labelled
from cwpo_trainer.data.splits import sample, split, write_splits
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import WeightedPair, read_weighted
from cwpo_trainer.outcome import Outcome
from cwpo_trainer.settings.data_preparation import (
    Drawing,
    LabelledFile,
    Mixing,
    Poisoning,
    Splitting,
)

# Temperatures between which that of a given noise is looked for, and the halvings of their ratio.
_COLDEST, _HOTTEST, _HALVINGS = 1e-9, 1e9, 100


def split_pairs(settings: Splitting) -> Outcome:
    """Write the three parts. Raises: ConfigError, DatasetError."""
    _check_new(settings.output)
    unused = UnusedRows(settings.max_rejected_share)
    pairs = sample(read_pairs(settings.data, unused), settings.max_pairs, seed=settings.seed)
    unused.tell(are_listed=False)
    parts = split(
        pairs,
        labelled_fraction=settings.labelled_fraction,
        held_out_fraction=settings.held_out_fraction,
        seed=settings.seed,
    )
    partial = settings.output.with_name(f".{settings.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_splits(parts, partial, seed=settings.seed)
    partial.rename(settings.output)
    sizes = {
        "labelled": len(parts.labelled),
        "unlabelled": len(parts.unlabelled),
        "held_out": len(parts.held_out),
    }
    return Outcome(
        f"{settings.output}: {sizes['labelled']:,} labelled, {sizes['unlabelled']:,} "
        f"unlabelled and {sizes['held_out']:,} held-out pairs",
        {"output": str(settings.output), **sizes},
    )


def poison(settings: Poisoning) -> Outcome:
    """Flip labels and write the pairs.

    The number of flipped labels is exact: each pair in turn is flipped with the probability that
    is left, flips by pairs (selection sampling, Knuth's Algorithm S).
    Raises: ConfigError, DatasetError.
    """
    _check_new(settings.output)
    confidences = _confidences(settings)
    flips = round(settings.share * len(confidences))
    if not flips:
        raise DatasetError(
            f"{settings.data}: a share of {settings.share:g} of {len(confidences):,} labels is none"
        )
    if settings.surest:
        surest = np.argsort(-confidences, kind="stable")[:flips]
        flipped = iter(np.isin(np.arange(len(confidences)), surest).tolist())
    else:
        flipped = drawn(flips, len(confidences), random.Random(settings.seed))  # noqa: S311
    rows = (
        row | {"flipped": is_flipped}
        for row, is_flipped in _with_flips(_pairs(settings), flipped, settings.seed)
        if is_flipped or not settings.only_flipped
    )
    written = flips if settings.only_flipped else len(confidences)
    figures = _write("poison", settings, rows, pairs=written, flipped=flips)
    told = f"{settings.output}: {written:,} pairs, the labels of {flips:,} of them flipped"
    return Outcome(told, figures)


def mix(settings: Mixing) -> Outcome:
    """Draw the shares of the sources, in random order.

    The column source names the file that a pair is from, unless its row names a source already.
    Raises: ConfigError, DatasetError, such as for a source with too few pairs.
    """
    _check_new(settings.output)
    sizes = {source: _count(source, settings) for source in settings.sources}
    counts = shares_of(settings.sources, sizes, settings.pairs)
    draw = random.Random(settings.seed)  # noqa: S311
    chosen = {
        source: _drawn_from(source, counts[source], sizes[source], settings) for source in counts
    }
    rows = (
        labelled_row(pair, a_is_chosen=_order(pair, draw))
        for pair in _interleaved(chosen, dict(counts), draw)
    )
    named: dict[str, Any] = {**counts}
    total = sum(counts.values())
    figures = _write("mix", settings, rows, pairs=total, drawn=named)
    told = ", ".join(f"{count:,} of {source}" for source, count in counts.items())
    return Outcome(f"{settings.output}: {total:,} pairs, {told}", figures)


def draw_labels(settings: Drawing) -> Outcome:
    """Draw each label from the Bradley-Terry probabilities of the scores.

    The annotator's label is kept with probability sigmoid(margin / T).
    Raises: ConfigError, DatasetError.
    """
    _check_new(settings.output)
    margins = weights.margin([pair.confidence for pair in _weighted(settings)]).astype(np.float64)
    temperature = 1.0 if settings.noise is None else temperature_for(margins, settings.noise)
    against = probability_against(margins, temperature)
    draw = random.Random(settings.seed)  # noqa: S311
    flipped = [draw.random() < probability for probability in against.tolist()]
    pairs = map(_labelled, _weighted(settings))
    rows = (row for row, _ in _with_flips(pairs, iter(flipped), settings.seed))
    figures = _write(
        "draw", settings, rows, pairs=len(flipped), against=sum(flipped), temperature=temperature
    )
    return Outcome(
        f"{settings.output}: {len(flipped):,} pairs, {sum(flipped):,} with another label than the "
        f"annotator's (temperature {temperature:.3g})",
        figures,
    )


def drawn(count: int, size: int, draw: random.Random) -> Iterator[bool]:
    """For each of `size` items in turn whether it is one of `count` that are drawn at random."""
    for left in range(size, 0, -1):
        is_drawn = draw.random() * left < count
        count -= is_drawn
        yield is_drawn


def shares_of(shares: dict[str, float], sizes: dict[str, int], total: int | None) -> dict[str, int]:
    """How many pairs to take of each source: the shares, rounded by largest remainders.

    Args:
        sizes: numbers of pairs that the sources have.
        total: numbers of pairs to take; None for as many as there are.
    Raises: DatasetError for a source with too few.
    """
    if total is None:
        total = min(math.floor(sizes[name] / share + 1e-9) for name, share in shares.items())
    exact = {name: share * total for name, share in shares.items()}
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name]):
        counts[name] += sum(counts.values()) < total
    for name, count in counts.items():
        if not 0 < count <= sizes[name]:
            raise DatasetError(
                f"{name}: {count:,} pairs are wanted and {sizes[name]:,} are there: change --pairs "
                "or the shares"
            )
    return counts


def probability_against(margins: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """sigmoid(-margin / T): that a drawn label differs, shape (n,); all 0 for T = 0."""
    if temperature == 0:
        return np.zeros_like(margins)
    return np.asarray(1 / (1 + np.exp(np.minimum(margins / temperature, 700))))


def temperature_for(margins: NDArray[np.float64], noise: float) -> float:
    """The T at which a share `noise` of drawn labels is expected to differ from the annotator's."""
    if noise == 0:
        return 0.0
    low, high = _COLDEST, _HOTTEST
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        if probability_against(margins, middle).mean() < noise:
            low = middle
        else:
            high = middle
    return high


def _check_new(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"{path} exists already: remove it, or choose another --output")


def _confidences(settings: Poisoning) -> NDArray[np.float32]:
    """Of each pair; 0 of labelled pairs, which have none."""
    values = [pair.confidence for pair in _weighted(settings)] if settings.surest else None
    if values is None:
        return np.zeros(_count(settings.data, settings), dtype=np.float32)
    return np.asarray(values, dtype=np.float32)


def _count(source: str, settings: LabelledFile) -> int:
    unused = UnusedRows(settings.max_rejected_share)
    count = sum(1 for _ in labelled_pairs(source, unused))
    unused.tell(are_listed=False)
    return count


def _pairs(settings: Poisoning) -> Iterator[LabelledPair]:
    if settings.surest:
        return map(_labelled, _weighted(settings))
    return labelled_pairs(settings.data, UnusedRows(settings.max_rejected_share))


def _weighted(settings: Poisoning | Drawing) -> Iterator[WeightedPair]:
    return read_weighted(Path(settings.data), UnusedRows(settings.max_rejected_share))


def _labelled(pair: WeightedPair) -> LabelledPair:
    return LabelledPair(pair.id, pair.prompt, pair.chosen, pair.rejected)


def _with_flips(
    pairs: Iterator[LabelledPair], flipped: Iterator[bool], seed: int
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The rows of the pairs, and whether the label of each is flipped."""
    order = random.Random(seed)  # noqa: S311
    for pair, is_flipped in zip(pairs, flipped, strict=True):
        row = labelled_row(pair, a_is_chosen=_order(pair, order), is_flipped=is_flipped)
        yield row, is_flipped


def _order(pair: LabelledPair, draw: random.Random) -> bool:
    """Whether the chosen response stands first: as it did, or at random where no order is known."""
    at_random = draw.random() < 0.5
    return at_random if pair.chosen_first is None else pair.chosen_first


def _drawn_from(source: str, count: int, size: int, settings: Mixing) -> Iterator[LabelledPair]:
    draw = random.Random(f"{settings.seed}:{source}")  # noqa: S311
    pairs = labelled_pairs(source, UnusedRows(settings.max_rejected_share))
    name = Path(source).name.partition(".")[0]
    for pair, is_drawn in zip(pairs, drawn(count, size, draw), strict=True):
        if is_drawn:
            yield LabelledPair(
                pair.id,
                pair.prompt,
                pair.chosen,
                pair.rejected,
                pair.chosen_first,
                pair.source or name,
            )


def _interleaved(
    chosen: dict[str, Iterator[LabelledPair]], left: dict[str, int], draw: random.Random
) -> Iterator[LabelledPair]:
    """All pairs of all sources: each next one is of a source by how many it has left."""
    for _ in range(sum(left.values())):
        (source,) = draw.choices([*left], [*left.values()])
        left[source] -= 1
        yield next(chosen[source])


def _write(
    command: str, settings: LabelledFile, rows: Iterator[dict[str, Any]], **done: Any
) -> dict[str, Any]:
    """Write the rows; returns the figures."""
    said = settings.model_dump(mode="json", exclude={"output", "max_rejected_share", "json_"})
    write_labelled(settings.output, rows, {"command": command, **said, **done})
    return {"output": str(settings.output), **done}
