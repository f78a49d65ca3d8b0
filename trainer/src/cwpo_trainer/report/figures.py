"""The figures of the report, as inline SVG that takes its text colour from the page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from cwpo_trainer.evaluation.metrics import ConfidenceBin, CoveragePoint, Estimate

COLOURS = ("#4f6df5", "#e8833a", "#2a9d6f", "#c0488b", "#8a6bd1")
# Replaced by the colour of the page's text, which may be light or dark.
_TEXT = "#012345"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.color": _TEXT,
    "legend.frameon": False,
}
_SMOOTHING_POINTS = 60
Point = tuple[float, float]


def confidence_histogram(confidences: NDArray[np.float32]) -> str:
    """Histogram of the confidences, as SVG."""
    with _figure("histogram") as (axes, svg):
        highest = min(1.0, max(float(confidences.max(initial=0)) * 1.02, 1e-6))
        axes.hist(confidences, bins=30, range=(0, highest), color=COLOURS[0], alpha=0.85)
        mean = float(confidences.mean())
        axes.axvline(mean, color=COLOURS[1], linewidth=1.5)
        axes.annotate(
            f"mean {mean:.3f}",
            (mean, 0.98),
            xycoords=axes.get_xaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="top",
        )
        axes.set_xlabel("confidence")
        axes.set_ylabel("pairs")
    return svg()


def accuracy_by_confidence(bins: Sequence[ConfidenceBin]) -> str:
    """Accuracy in each bin with its interval, and the accuracy expected from its confidence."""
    with _figure("accuracy") as (axes, svg):
        places = np.arange(len(bins))
        axes.bar(places, [item.accuracy for item in bins], color=COLOURS[0], alpha=0.85)
        _intervals(axes, places, bins)
        promised = [(1 + item.mean_confidence) / 2 for item in bins]
        axes.plot(places, promised, "o-", color=COLOURS[1], label="expected: (1 + confidence) / 2")
        axes.axhline(0.5, color=_TEXT, linewidth=0.8, linestyle=":")
        labels = [f"{item.mean_confidence:.2g}" for item in bins]
        axes.set_xticks(places, labels, rotation=45, ha="right")
        axes.set_ylim(0, 1.18)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("mean confidence of the bin")
        axes.set_ylabel("agrees with the human label")
        axes.legend(loc="upper left")
    return svg()


def accuracy_by_coverage(
    points: Sequence[CoveragePoint], *, max_error: float, certified: float | None
) -> str:
    """Accuracy of the most confident pairs with its interval, by their share of all pairs.

    Args:
        max_error: largest share of wrong labels that was asked for.
        certified: share of the pairs that are certified, if there is a certificate.
    """
    with _figure("coverage") as (axes, svg):
        coverage = [point.coverage for point in points]
        lows = [point.accuracy.low for point in points]
        highs = [point.accuracy.high for point in points]
        axes.fill_between(coverage, lows, highs, color=COLOURS[0], alpha=0.2, linewidth=0)
        values = [point.accuracy.value for point in points]
        axes.plot(coverage, values, "o-", color=COLOURS[0], markersize=4)
        asked = f"{100 * (1 - max_error):.3g} % asked for"
        axes.axhline(1 - max_error, color=COLOURS[1], linewidth=1.2, label=asked)
        if certified is not None:
            axes.axvline(certified, color=COLOURS[2], linewidth=1.5, label="certified, left of it")
        axes.axhline(0.5, color=_TEXT, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlim(0, 1.02)
        axes.set_ylim(min(0.45, *lows), 1.02)
        axes.set_xlabel("share of the pairs, the most confident first")
        axes.set_ylabel("agrees with the human label")
        axes.legend(loc="lower left")
    return svg()


def reliability(bins: Sequence[ConfidenceBin]) -> str:
    """How often labels are right, against how often their confidence says they are.

    Also by calibrated confidence, where there is one.
    """
    with _figure("reliability") as (axes, svg):
        accuracy = [item.accuracy for item in bins]
        axes.plot([0.5, 1], [0.5, 1], color=_TEXT, linewidth=0.8, linestyle=":")
        raw = [(1 + item.mean_confidence) / 2 for item in bins]
        axes.plot(raw, accuracy, "o-", color=COLOURS[0], label="confidence")
        calibrated = [item.mean_calibrated_confidence for item in bins]
        means = [(1 + mean) / 2 for mean in calibrated if mean is not None]
        if len(means) == len(bins):
            axes.plot(means, accuracy, "s-", color=COLOURS[1], label="calibrated confidence")
            _intervals(axes, means, bins)
        else:
            _intervals(axes, raw, bins)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel("probability that the label is right, says the annotator")
        axes.set_ylabel("agrees with the human label")
        axes.legend(loc="lower right")
    return svg()


def embeddings(here: Sequence[Point], there: Sequence[Point], other: str) -> str:
    """Two samples of texts on the principal components of all (cf. Fig. 6).

    Args:
        here: the labelled pairs; there: triplets of a file that is named `other`.
    """
    with _figure("embeddings") as (axes, svg):
        samples = (("labelled pairs", here, "o"), (other, there, "^"))
        for (name, points, marker), colour in zip(samples, COLOURS, strict=False):
            across, up = zip(*points, strict=True)
            axes.scatter(
                across, up, s=16, marker=marker, color=colour, alpha=0.45, linewidth=0, label=name
            )
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second principal component")
        axes.legend(loc="best")
    return svg()


def _intervals(
    axes: Axes, places: Sequence[float] | NDArray[np.integer[Any]], bins: Sequence[ConfidenceBin]
) -> None:
    """The intervals of the bins' accuracies, which bins of an earlier version lack."""
    for place, item in zip(places, bins, strict=True):
        if item.low is not None and item.high is not None:
            axes.plot([place, place], [item.low, item.high], color=_TEXT, linewidth=1, alpha=0.7)


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], value: str, label: str) -> str:
    """A line for each training log: `value` by step, smoothed, with the raw values behind it."""
    with _figure(f"curves-{value}") as (axes, svg):
        for (name, lines), colour in zip(logs.items(), _cycled(COLOURS), strict=False):
            points = [(line["step"], line[value]) for line in lines if value in line]
            steps = [step for step, _ in points]
            values = [float(number) for _, number in points]
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, _smoothed(values), color=colour, linewidth=2, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(logs) > 1:
            axes.legend()
    return svg()


def shares(rows: Sequence[tuple[str, Estimate]], *, middle: float, label: str) -> str:
    """Shares with their intervals, one below the other.

    Args:
        middle: the share that means no difference; an interval that holds it is drawn pale.
    """
    with _figure(f"shares-{label}", height=1.1 + 0.36 * len(rows)) as (axes, svg):
        for place, (_, share) in enumerate(rows):
            is_shown = not share.low <= middle <= share.high
            colour = COLOURS[2] if share.value > middle else COLOURS[3]
            look: dict[str, Any] = {
                "color": colour if is_shown else _TEXT,
                "alpha": 1 if is_shown else 0.5,
            }
            axes.plot([share.low, share.high], [place, place], linewidth=2.5, **look)
            axes.plot([share.value], [place], "o", markersize=7, **look)
        axes.axvline(middle, color=_TEXT, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel(label)
    return svg()


def reward_gaps(gaps: Mapping[str, Sequence[float]], baseline: str) -> str:
    """Sorted differences in reward of each policy, over the share of prompts (Fig. 5).

    Args:
        gaps: of each policy, ascending, at least one.
        baseline: name of the model that they are differences from.
    """
    with _figure(f"gaps-{baseline}") as (axes, svg):
        for (name, values), colour in zip(gaps.items(), _cycled(COLOURS), strict=False):
            below = (np.arange(len(values)) + 0.5) / len(values)
            higher = float((np.asarray(values) > 0).mean())
            axes.plot(below, values, color=colour, linewidth=2, label=f"{name}: {higher:.1%} above")
            axes.fill_between(below, values, 0, color=colour, alpha=0.08, linewidth=0)
        axes.axhline(0, color=_TEXT, linewidth=0.8)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel("share of the prompts, the smallest gap first")
        axes.set_ylabel(f"reward less that of {baseline}")
        axes.legend(loc="upper left")
    return svg()


def shares_by_divergence(rows: Sequence[tuple[str, float, Estimate]]) -> str:
    """Share of prompts won, over the divergence from the reference.

    Args:
        rows: name, divergence in nats an answer, and share.
    """
    with _figure("divergence") as (axes, svg):
        for (name, divergence, share), colour in zip(rows, _cycled(COLOURS), strict=False):
            axes.plot([divergence] * 2, [share.low, share.high], color=colour, linewidth=2)
            axes.plot([divergence], [share.value], "o", color=colour, markersize=7)
            axes.annotate(
                name,
                (divergence, share.value),
                xytext=(8, 4),
                textcoords="offset points",
            )
        axes.axhline(0.5, color=_TEXT, linewidth=0.8, linestyle=":")
        axes.margins(x=0.25)
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel("divergence from the reference, nats an answer")
        axes.set_ylabel("gold reward accuracy")
    return svg()


def by_column(
    columns: Sequence[str],
    ours: Mapping[str, Sequence[tuple[float | None, tuple[float, float] | None]]],
    papers: Mapping[str, Sequence[float | None]],
    label: str,
    *,
    bars: bool,
) -> str:
    """The figures of a table by column: bars, or a line for each of its lines.

    Args:
        ours: by name, a figure for each column, and its 95 % interval; None where there is none.
        papers: likewise the figures of the paper, which are drawn hollow.
        label: what the figures are.
    """
    with _figure("by-column") as (axes, svg):
        places = np.arange(len(columns))
        width = 0.8 / max(1, len(ours))
        for at, ((name, figures), colour) in enumerate(
            zip(ours.items(), _cycled(COLOURS), strict=False)
        ):
            shifted = places + ((at + 0.5) * width - 0.4 if bars else 0)
            heights = [math.nan if value is None else value for value, _ in figures]
            if bars:
                axes.bar(shifted, heights, width, color=colour, alpha=0.85, label=name)
            else:
                axes.plot(shifted, heights, "o-", color=colour, label=name)
            for place, (_, interval) in zip(shifted, figures, strict=True):
                if interval is not None:
                    axes.plot([place, place], interval, color=_TEXT, linewidth=1, alpha=0.7)
            theirs = [math.nan if value is None else value for value in papers[name]]
            axes.plot(shifted, theirs, "D", color=colour, markerfacecolor="none")
        axes.set_xticks(places, columns)
        axes.set_ylabel(label)
        is_compared = any(value is not None for figures in papers.values() for value in figures)
        title = "hollow: the paper" if is_compared else None
        axes.legend(fontsize=7, title=title, title_fontsize=7)
    return svg()


@contextmanager
def _figure(name: str, *, height: float = 3.4) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on, and a function that returns the SVG once the block has ended."""
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.subplots()
        sink = io.StringIO()
        yield axes, lambda: _inline(sink.getvalue())
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})


def _inline(document: str) -> str:
    svg = document[document.index("<svg") :]
    return svg.replace(_TEXT, "currentColor").replace("<svg ", '<svg role="img" ', 1)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average; the more values, the smoother."""
    keep = 1 - 1 / max(1.0, min(len(values), _SMOOTHING_POINTS) / 6)
    result: list[float] = []
    for value in values:
        last = result[-1] if result else value
        result.append(keep * last + (1 - keep) * value if math.isfinite(value) else last)
    return result


def _cycled(colours: Sequence[str]) -> Iterator[str]:
    while True:
        yield from colours
