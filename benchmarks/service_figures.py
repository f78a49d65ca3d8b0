"""The figures of the service's benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measurement import draw, plotting


def draw_load(points: list[dict[str, Any]], path: Path) -> None:
    """Latency, refusals and goodput against offered load."""
    plt = plotting()
    offered = [point["offered"] for point in points]
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 2), layout="constrained"
    )
    for name in ("p50", "p95", "p99"):
        above.plot(offered, [point[f"{name}_ms"] for point in points], marker="o", label=name)
    above.set(yscale="log", ylabel="latency of answers (ms)", title="Latency against offered load")
    above.legend()
    for name, values in (("refused", "refused"), ("goodput, of the capacity", "goodput")):
        below.plot(offered, [100 * point[values] for point in points], marker="o", label=name)
    below.set(xlabel="offered load, in multiples of the device's capacity", ylabel="%", ylim=0)
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.axvline(1.0, color="grey", linestyle=":")
    draw(figure, path)


def draw_memory(samples: list[tuple[int, float]], path: Path) -> None:
    """Resident memory against the requests answered."""
    figure, axes = plotting().subplots(figsize=(7, 3), layout="constrained")
    axes.plot([count for count, _ in samples], [mib for _, mib in samples])
    axes.set(xlabel="requests answered", ylabel="resident memory (MiB)", ylim=0)
    axes.grid(alpha=0.3)
    draw(figure, path)
