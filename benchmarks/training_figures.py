"""Tables and curves of the training benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measurement
from rich.console import Console
from rich.table import Table

from cwpo_trainer.plan import estimate

CONTESTANTS = ("cwpo", "trl")


def show_dpo(dpo: dict[str, Any]) -> None:
    times = {name: statistics.median(of) for name, of in dpo["step_seconds"].items()}
    memory = {name: of / 2**20 for name, of in dpo["peak_bytes"].items()}
    table = Table("CW-DPO step", "cwpo", "TRL", "cwpo / TRL", "bar", box=None)
    table.add_row("seconds", *figures(times, "{:.3f}"), f"{dpo['time_ratio']:.2f}", "<= 1.05")
    ratio = f"{dpo['memory_ratio']:.2f}"
    table.add_row("peak MiB of a process", *figures(memory, "{:,.0f}"), ratio, "<= 1.05")
    Console().print(table)
    rate = dpo["matrix_products_per_second"] / 1e12
    Console().print(
        f"{dpo['share_of_matrix_products']:.0%} of the {rate:.3g} TFLOP/s of matrix products; "
        f"plans count on {estimate.UTILISATION:.0%}"
    )
    show_curves(dpo)


def show_bt(bt: dict[str, Any]) -> None:
    table = Table("Bradley-Terry", "cwpo", "TRL", "cwpo / TRL", "bar", box=None)
    ratio = f"{bt['rate_ratio']:.2f}"
    table.add_row("pairs/s", *figures(bt["pairs_per_second"], "{:.2f}"), ratio, ">= 1.3")
    late = figures(bt["mean_loss_of_second_half"], "{:.4f}")
    table.add_row("loss, second half", *late, "", "the same")
    Console().print(table)
    show_curves(bt)


def show_curves(result: dict[str, Any]) -> None:
    for name in CONTESTANTS:
        Console().print(f"loss of {name:<4}", *(f"{loss:.3f}" for loss in result["loss"][name]))
    Console().print(f"at most {result['largest_loss_difference']:.4f} apart\n")


def show_length(rows: list[dict[str, Any]]) -> None:
    table = Table("tokens a text", "bt, s a pair", "CW-DPO, s a pair", box=None)
    for row in rows:
        seconds = row["seconds_a_pair"]
        table.add_row(str(row["length"]), f"{seconds['bt']:.3f}", f"{seconds['cw_dpo']:.3f}")
    Console().print(table)


def show_size(rows: list[dict[str, Any]]) -> None:
    table = Table("pairs", "tokenising, s", "pairs/s", box=None)
    for row in rows:
        table.add_row(f"{row['pairs']:,}", f"{row['seconds']:.2f}", f"{row['rate']:,.0f}")
    Console().print(table)


SHOWN: dict[str, Callable[[Any], None]] = {
    "dpo": show_dpo,
    "bt": show_bt,
    "length": show_length,
    "size": show_size,
}


def figures(of: dict[str, float], form: str) -> list[str]:
    return [form.format(of[name]) for name in CONTESTANTS]


def draw(results: dict[str, Any], path: Path) -> None:
    """The loss curves, and the cost by length, of the parts that ran."""
    drawn = [part for part in ("dpo", "bt", "length") if part in results]
    if not drawn:
        return
    figure = measurement.plotting().figure(figsize=(4.5 * len(drawn), 3.5), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        if part == "length":
            draw_cost(axes, results[part])
            continue
        for name, loss in results[part]["loss"].items():
            axes.plot(range(1, len(loss) + 1), loss, label=name)
        title = {"dpo": "CW-DPO loss", "bt": "Bradley-Terry loss"}[part]
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend()
    measurement.draw(figure, path)


def draw_cost(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in ("bt", "cw_dpo"):
        seconds = [row["seconds_a_pair"][name] for row in rows]
        axes.plot([row["length"] for row in rows], seconds, marker="o", label=name)
    axes.set(title="cost of a pair", xlabel="tokens a text", ylabel="seconds", ylim=(0, None))
    axes.legend()
