"""`--dry-run`: what a run would do and need, said before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cwpo_trainer import estimate, policy, runtime
from cwpo_trainer.estimate import DEVICES, Device, Shape

if TYPE_CHECKING:
    from cwpo_trainer.commands import PolicyTraining

_GIB = 2**30


class Plan:
    """A run of sft or align, before it starts.

    Args:
        lengths: tokens of each text that one epoch reads, shape (rows, texts of a row).
        scored: of these, tokens that carry the loss, same shape.
        with_reference: a second model is held while training.
        reads_reference: when the reference runs, if at all.
    """

    def __init__(
        self,
        settings: PolicyTraining,
        folder: Path,
        lengths: NDArray[np.int64],
        scored: NDArray[np.int64],
        *,
        with_reference: bool,
        reads_reference: Literal["never", "once", "every step"],
    ) -> None:
        self.settings = settings
        self.shape = Shape.read(folder)
        self.lengths = lengths
        self.scored = scored
        self.with_reference = with_reference
        self.reads_reference = reads_reference
        self.processes = policy.processes(settings)
        self.steps = settings.max_steps or policy.total_steps(settings, len(lengths))
        self.texts = settings.batch_size * lengths.shape[1]

    @property
    def tokens(self) -> float:
        """Tokens of all texts that training reads, without padding."""
        pairs = self.settings.batch_size * self.settings.gradient_accumulation * self.processes
        return float(self.lengths.mean() * self.lengths.shape[1] * pairs * self.steps)

    def memory(self, devices: int = 1) -> estimate.Memory:
        """On each device at the batch of the longest texts."""
        return estimate.memory(
            self.shape,
            self.settings,
            texts=self.texts,
            tokens=int(self.lengths.max()),
            scored=int(self.scored.max()),
            with_reference=self.with_reference,
            sharded_over=devices,
        )

    def operations(self, *, scored_alone: bool = True) -> float:
        """Of the whole run.

        Args:
            scored_alone: the head reads the tokens that carry the loss alone, as it does on GPUs;
                on CPUs it reads all but the last of each text.
        """
        passes = self.tokens / self.lengths.sum()
        padded = self._padded()
        tokens = float(padded.sum())
        scored = self.scored.sum() if scored_alone else tokens - padded.size
        return estimate.operations(
            self.shape,
            self.settings,
            tokens=float(passes * tokens),
            scored=float(passes * scored),
            length=float((padded**2).sum()) / tokens,
            reference={"never": 0.0, "once": 1 / passes, "every step": 1.0}[self.reads_reference],
        )

    def _padded(self) -> NDArray[np.float64]:
        """Tokens of each text with padding, shape (rows, texts of a row), in some random order."""
        longest = self.lengths.max(axis=1)
        np.random.default_rng(self.settings.seed).shuffle(longest)
        of_batch = np.maximum.reduceat(
            longest, np.arange(0, len(longest), self.settings.batch_size)
        ).repeat(self.settings.batch_size)[: len(longest)]
        return np.repeat(of_batch[:, None], self.lengths.shape[1], axis=1).astype(np.float64)

    def hours(self, device: Device) -> float:
        """On as many such devices as there are processes."""
        per_second = device.tflops * 1e12 * estimate.UTILISATION * self.processes
        return self.operations() / per_second / 3600

    def hours_here(self) -> tuple[float, float]:
        """Hours on this machine, on one GPU if it has any; and its measured FLOP/s."""
        bfloat16 = runtime.use_bfloat16(self.settings.dtype)
        rate = estimate.measured_rate(torch.bfloat16 if bfloat16 else torch.float32)
        operations = self.operations(scored_alone=torch.accelerator.is_available())
        return operations / (rate * estimate.UTILISATION) / 3600, rate

    def devices_needed(self, device: Device) -> int | None:
        """The least number that has to share the model; None where not even 64 do."""
        return estimate.devices_needed(
            device,
            self.shape,
            self.settings,
            texts=self.texts,
            tokens=int(self.lengths.max()),
            scored=int(self.scored.max()),
            with_reference=self.with_reference,
        )

    def show(self, facts: Sequence[tuple[str, str]]) -> None:
        """Print it. `facts` are lines of the command's own, to put first."""
        console = Console()
        grid = Table.grid(padding=(0, 2))
        for name, text in (*facts, *self._facts()):
            grid.add_row(f"[bold]{name}[/]", text)
        console.print(grid)
        console.print(self._devices())

    def _facts(self) -> list[tuple[str, str]]:
        settings = self.settings
        sharded = self.processes if settings.sharding != "none" else 1
        memory = self.memory(sharded)
        parts = ", ".join(
            f"{name.replace('_', ' ')} {held / _GIB:.3g}"
            for name, held in asdict(memory).items()
            if held
        )
        hours, rate = self.hours_here()
        kind = "GPU" if torch.accelerator.is_available() else "CPU"
        batch = f"{settings.batch_size} x {settings.gradient_accumulation} x {self.processes}"
        return [
            ("model", f"{settings.model}, {self.shape.parameters / 1e6:,.1f} M parameters"),
            (
                "texts",
                f"{self.lengths.size:,}, {self.lengths.sum():,} tokens; "
                f"mean {self.lengths.mean():,.0f}, longest {self.lengths.max():,}",
            ),
            (
                "steps",
                f"{self.steps:,}, each of {batch} rows (a device x accumulated x processes); "
                f"{self.tokens:,.0f} tokens in all",
            ),
            ("memory", f"{memory.total / _GIB:.3g} GiB a device at the peak ({parts})"),
            (
                "here",
                f"{_time(hours)} on this {kind}, at {estimate.UTILISATION:.0%} of the "
                f"{rate / 1e12:.3g} TFLOP/s measured on it",
            ),
        ]

    def _devices(self) -> Table:
        table = Table("GPU", "GiB", "fits as set", "must share it", "time")
        sharded = self.processes if self.settings.sharding != "none" else 1
        too_many = "cannot" if self.settings.load_in_4bit else "over 64"
        for device in DEVICES:
            fits = estimate.fits(device, self.memory(sharded))
            needed = self.devices_needed(device)
            table.add_row(
                device.name,
                f"{device.gib:g}",
                "yes" if fits else "no",
                too_many if needed is None else str(needed),
                _time(self.hours(device)),
            )
        table.caption = (
            f"time on {self.processes} of them at {estimate.UTILISATION:.0%} of the peak"
        )
        return table


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.1 else f"{math.ceil(hours * 60)} min"
