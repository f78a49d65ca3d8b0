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


# What is aimed at, of each data set: most of TRL's time, and how many times its speed.
DPO_TIME = {"hh_harmless": 0.62, "qa_feedback": 0.50}
BT_SPEED = {"hh_harmless": 2, "qa_feedback": 4}
DPO_MEMORY = 0.5


def show_memory(data: str, memory: dict[str, Any]) -> None:
    table = Table(f"CW-DPO on {data}", "cwpo", "TRL", "cwpo / TRL", "bar", box=None)
    peaks = figures({name: of / 2**20 for name, of in memory["peak_bytes"].items()}, "{:,.0f}")
    what = f"peak MiB of {memory['steps']} steps"
    table.add_row(what, *peaks, f"{memory['memory_ratio']:.2f}", f"<= {DPO_MEMORY}")
    Console().print(table)


def show_dpo(data: str, dpo: dict[str, Any]) -> None:
    table = Table(f"CW-DPO on {data}", "cwpo", "TRL", "cwpo / TRL", "bar", box=None)
    seconds = figures(medians(dpo["step_seconds"]), "{:.3f}")
    bar = f"<= {DPO_TIME[data]:.2f}"
    table.add_row("seconds a step", *seconds, f"{dpo['time_ratio']:.2f}", bar)
    table.add_row(*tokens_row(dpo), f"{dpo['token_ratio']:.2f}")
    means = {name: statistics.mean(of) for name, of in dpo["loss"].items()}
    table.add_row("loss, mean", *figures(means, "{:.4f}"), "", "the same")
    Console().print(table)
    rate = dpo["matrix_products_per_second"] / 1e12
    Console().print(
        f"{dpo['share_of_matrix_products']:.0%} of the {rate:.3g} TFLOP/s of matrix products; "
        f"plans count on {estimate.UTILISATION:.0%}"
    )
    show_curves(dpo)


def show_bt(data: str, bt: dict[str, Any]) -> None:
    table = Table(f"Bradley-Terry on {data}", "cwpo", "TRL", "ratio", "bar", box=None)
    rates = figures(bt["pairs_per_second"], "{:.2f}")
    bar = f">= {BT_SPEED[data]} x"
    table.add_row("pairs/s", *rates, f"{bt['rate_ratio']:.2f} x", bar)
    # The other way round, so that at one speed a token both ratios are the same.
    table.add_row(*tokens_row(bt), f"{1 / bt['token_ratio']:.2f} x fewer")
    late = figures(bt["mean_loss_of_second_half"], "{:.4f}")
    table.add_row("loss, second half", *late, "", "the same")
    Console().print(table)
    show_curves(bt)


def tokens_row(result: dict[str, Any]) -> list[str]:
    return ["tokens read in a step", *figures(medians(result["tokens"]), "{:,.0f}")]


def medians(of: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in of.items()}


def show_curves(result: dict[str, Any]) -> None:
    for name in CONTESTANTS:
        Console().print(f"loss of {name:<4}", *(f"{loss:.3f}" for loss in result["loss"][name]))
    Console().print(
        f"on average {result['mean_loss_difference']:.2g} apart, "
        f"at most {result['largest_loss_difference']:.2g}\n"
    )


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


SHOWN: dict[str, Callable[..., None]] = {
    "memory": show_memory,
    "dpo": show_dpo,
    "bt": show_bt,
    "length": show_length,
    "size": show_size,
}


def figures(of: dict[str, float], form: str) -> list[str]:
    return [form.format(of[name]) for name in CONTESTANTS]


def draw(results: dict[str, Any], path: Path) -> None:
    """The loss curves, and the cost by length, of the parts that ran."""
    titles = {"dpo": "CW-DPO", "bt": "Bradley-Terry"}
    curves = {
        f"{title} loss, {data}": result["loss"]
        for part, title in titles.items()
        for data, result in results.get(part, {}).items()
    }
    drawn = len(curves) + ("length" in results)
    if not drawn:
        return
    figure = measurement.plotting().figure(figsize=(4.5 * drawn, 3.5), layout="constrained")
    panels = figure.subplots(1, drawn, squeeze=False)[0]
    for axes, (title, losses) in zip(panels, curves.items(), strict=False):
        for name, loss in losses.items():
            axes.plot(range(1, len(loss) + 1), loss, label=name)
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend()
    if "length" in results:
        draw_cost(panels[-1], results["length"])
    measurement.draw(figure, path)


def draw_cost(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in ("bt", "cw_dpo"):
        seconds = [row["seconds_a_pair"][name] for row in rows]
        axes.plot([row["length"] for row in rows], seconds, marker="o", label=name)
    axes.set(title="cost of a pair", xlabel="tokens a text", ylabel="seconds", ylim=(0, None))
    axes.legend()
