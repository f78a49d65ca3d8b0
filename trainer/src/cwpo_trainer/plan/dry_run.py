"""`--dry-run`: what a run would do and need, said before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cwpo_annotator.backends.torch.rows.packing import LEAST_SHARED
from cwpo_trainer.plan import estimate
from cwpo_trainer.plan.estimate import DEVICES, Device, Method, Shape
from cwpo_trainer.plan.row_sizes import ROW_MULTIPLE, filled, row_tokens
from cwpo_trainer.plan.schedule import processes, processes_a_node, rows_a_step, total_steps
from cwpo_trainer.run import process
from cwpo_trainer.settings.mixins import ShardingName, Training
from cwpo_trainer.settings.policy_training import PolicyTraining

_GIB = 2**30
BYTES_A_PAIR = 50
"""In the reference cache: a key of 32 bytes, two numbers, and what Parquet adds."""


@dataclass(frozen=True, slots=True)
class ReferenceUse:
    """How the reference model is read.

    is_second_model: it is held in memory beside the policy; is_precomputed: it reads the data once,
    before training, rather than in every step; cache: folder in which what it has read is kept.
    """

    is_second_model: bool
    is_precomputed: bool
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Batches:
    """How a run reads its data.

    size: items of a batch that a device reads, in one packed row or in several; of_step: items of
    an optimiser step, over all devices; described: these, for the user; row_limit: maximum number
    of tokens in a row of several items, on a device of this type, None for one row; filled_to:
    number of tokens that rows are filled up to a multiple of; alike: padded batches are of items of
    about one length.
    """

    size: int
    of_step: int
    steps: int
    described: str
    row_limit: Callable[[str], int | None]
    filled_to: int = ROW_MULTIPLE
    alike: bool = False


@dataclass(frozen=True, slots=True)
class Texts:
    """What one epoch reads.

    lengths: tokens of each text, shape (items, texts of an item); scored: of these, tokens that
    carry the loss, same shape; shared: tokens with which all texts of an item begin, shape
    (items,).
    """

    lengths: NDArray[np.int64]
    scored: NDArray[np.int64]
    shared: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reading:
    """Texts that the model reads without training, and how often."""

    texts: Texts
    times: float


class Plan:
    """A training, before it starts.

    Args:
        training: of which model, number format, seed and --world-size are read.
        sharding: how devices hold the model.
        facts: names and values of the command's own, to show first.
        reference: None for a loss without one.
        before: a training of the same model that the run begins with.
        readings: what the model reads besides, as in validation.
        loads_once: the first process alone loads the models.
    """

    def __init__(
        self,
        training: Training,
        shape: Shape,
        method: Method,
        texts: Texts,
        batches: Batches,
        *,
        sharding: ShardingName,
        facts: Sequence[tuple[str, str]] = (),
        reference: ReferenceUse | None = None,
        before: Plan | None = None,
        readings: Sequence[Reading] = (),
        loads_once: bool = False,
    ) -> None:
        self.model = training.model
        self.dtype = training.dtype
        self.seed = training.seed
        self.shape = shape
        self.method = method
        self.lengths, self.scored = texts.lengths, texts.scored
        self.shared = _shared(texts)
        self.batches = batches
        self.facts = facts
        self.reference = reference
        self.before = before
        self.readings = readings
        self.processes = processes(training.world_size)
        self.sharded_over = self.processes if sharding != "none" else 1
        self.is_loaded_in_parts = sharding == "zero3"
        self.loads_once = loads_once
        self.node_processes = processes_a_node(self.processes)

    @property
    def tokens(self) -> float:
        """Tokens of all texts that training reads, without padding."""
        items = self.batches.of_step * self.batches.steps
        return float(self.lengths.mean() * self.lengths.shape[1] * items)

    def memory(self, devices: int = 1, *, on_cpu: bool = False) -> estimate.Memory:
        """On each device at the batch of the longest texts."""
        rows = self._largest_batch(on_cpu)
        return estimate.memory(
            self.shape,
            self._method(on_cpu, len(rows)),
            **self._largest_pass(rows),
            with_reference=self._peaks_with_reference,
            sharded_over=devices,
            on_cpu=on_cpu,
        )

    def _method(self, on_cpu: bool, rows: int) -> Method:
        """Of training on this device, with batches of so many rows."""
        accumulation = self.method.accumulation * rows
        bfloat16 = process.use_bfloat16(self.dtype) if on_cpu else self.method.bfloat16
        return replace(self.method, accumulation=accumulation, bfloat16=bfloat16)

    def _largest_batch(self, on_cpu: bool) -> list[int]:
        """Tokens of the rows of the largest batch, or of its padded batches."""
        size = self.batches.size
        if self.method.packed:
            largest = np.sort(self._read)[-size:]
            rows = self._filled(largest, on_cpu)
            return [max(*rows, int(largest[-1]))] * len(rows)
        of_item = self.lengths.shape[1] * int(self.lengths.max())
        limit = self._row_limit(on_cpu)
        at_once = size if limit is None else max(1, min(size, limit // of_item))
        return [at_once * of_item] * math.ceil(size / at_once)

    def _largest_pass(self, rows: Sequence[int]) -> dict[str, int]:
        """Tokens of the largest forward pass, and how many of them carry the loss."""
        if self.method.packed:
            scored = int(np.sort(self.scored.sum(axis=1))[-self.batches.size :].sum())
        else:
            scored = self.batches.size * self.lengths.shape[1] * int(self.scored.max())
        return {"tokens": rows[0], "scored": min(scored, rows[0])}

    def operations(self, *, on_cpu: bool = False) -> float:
        """Of the whole run.

        The head reads tokens that carry the loss; on a CPU, in padded batches, all but the last.
        """
        besides = sum(map(self._reading_operations, self.readings))
        if self.before is not None:
            besides += self.before.operations(on_cpu=on_cpu)
        passes = self.tokens / self.lengths.sum()
        read, seen = self._packed(on_cpu) if self.method.packed else self._padded()
        scored = float(self.scored.sum())
        if on_cpu and not self.method.packed:
            scored = read - self.lengths.size
        return besides + estimate.operations(
            self.shape,
            self.method,
            tokens=passes * read,
            scored=passes * scored,
            length=seen / read,
            reference=self._reference_passes(passes) / passes,
        )

    def _reading_operations(self, reading: Reading) -> float:
        """Of texts that are read by length, so that there is no padding to count."""
        texts = reading.texts
        shared = _shared(texts) if self.method.packed else np.zeros_like(texts.shared)
        own = texts.lengths - shared[:, None]
        read = float(own.sum() + shared.sum())
        if not read:
            return 0.0
        seen = float((own * texts.lengths).sum() + (shared**2).sum())
        return reading.times * estimate.reading_operations(
            self.shape,
            self.method,
            tokens=read,
            scored=float(texts.scored.sum()),
            length=seen / read,
        )

    @property
    def _loads_reference(self) -> bool:
        return self.reference is not None and self.reference.is_second_model

    @property
    def _peaks_with_reference(self) -> bool:
        """Whether the reference is in memory at the peak.

        One that reads the pairs in advance is gone before there are gradients, which are more than
        it if all weights are trained.
        """
        is_gone = self.reference is not None and self.reference.is_precomputed
        return self._loads_reference and not (is_gone and self.method.lora_rank is None)

    def _reference_passes(self, passes: float) -> float:
        """How often the reference reads the data while training reads it so often."""
        if self.reference is None:
            return 0
        return 1 if self.reference.is_precomputed else passes

    @property
    def _read(self) -> NDArray[np.int64]:
        """Tokens of each item that a packed row holds, shape (items,)."""
        again = self.shared * (self.lengths.shape[1] - 1)
        read: NDArray[np.int64] = self.lengths.sum(axis=1) - again
        return read

    def _row_limit(self, on_cpu: bool) -> int | None:
        return self.batches.row_limit("cpu" if on_cpu else "cuda")

    def _filled(self, sizes: NDArray[np.int64], on_cpu: bool) -> list[int]:
        limit = self._row_limit(on_cpu)
        return filled(sizes.tolist(), limit, multiple=self.batches.filled_to)

    def _packed(self, on_cpu: bool) -> tuple[float, float]:
        """Tokens that an epoch reads, filled up, and for each of them those that it attends to."""
        read, size = self._read, self.batches.size
        shuffled = np.random.default_rng(self.seed).permutation(read)
        batches = np.split(shuffled, range(size, len(read), size))
        tokens = sum(sum(self._filled(batch, on_cpu)) for batch in batches)
        own = self.lengths - self.shared[:, None]
        seen = (own * self.lengths).sum() + (self.shared**2).sum()
        return float(tokens), float(seen)

    def _padded(self) -> tuple[float, float]:
        """Tokens of an epoch with padding, and for each of them those of its text."""
        longest = np.random.default_rng(self.seed).permutation(self.lengths.max(axis=1))
        size = 1 if self.batches.alike else self.batches.size
        starts = np.arange(0, len(longest), size)
        of_batch = np.maximum.reduceat(longest, starts).repeat(size)[: len(longest)]
        texts = self.lengths.shape[1]
        return float(texts * of_batch.sum()), float(texts * (of_batch**2).sum())

    @property
    def loaded(self) -> tuple[float, float]:
        """Bytes of policy and reference that a process loads into main memory.

        Under ZeRO-3 a process keeps its share of them.
        """
        share = 1 / self.processes if self.is_loaded_in_parts else 1
        reference = estimate.loaded_reference(
            self.shape, self.method, is_sharded=self.sharded_over > 1
        )
        policy = estimate.loaded_policy(self.shape, self.method)
        return share * policy, share * reference if self._loads_reference else 0

    def hours(self, device: Device) -> float:
        """On as many such devices as there are processes."""
        per_second = device.tflops * 1e12 * estimate.UTILISATION * self.processes
        return self.operations() / per_second / 3600

    def hours_here(self) -> tuple[float, float]:
        """Hours on this machine, on one GPU if it has any; and its measured FLOP/s."""
        bfloat16 = process.use_bfloat16(self.dtype)
        rate = estimate.measured_rate(torch.bfloat16 if bfloat16 else torch.float32)
        operations = self.operations(on_cpu=not torch.accelerator.is_available())
        return operations / (rate * estimate.UTILISATION) / 3600, rate

    def devices_needed(self, device: Device) -> int | None:
        """The least number that has to share the model; None where not even 64 do."""
        rows = self._largest_batch(on_cpu=False)
        return estimate.devices_needed(
            device,
            self.shape,
            self._method(False, len(rows)),
            **self._largest_pass(rows),
            with_reference=self._peaks_with_reference,
        )

    def show(self) -> None:
        """Print it."""
        console = Console()
        grid = Table.grid(padding=(0, 2))
        for name, text in (*self.facts, *self._figures()):
            grid.add_row(f"[bold]{name}[/]", text)
        console.print(grid)
        console.print(self._devices())

    def _figures(self) -> list[tuple[str, str]]:
        on_cpu = not torch.accelerator.is_available()
        memory = self.memory(self.sharded_over, on_cpu=on_cpu)
        parts = ", ".join(
            f"{name.replace('_', ' ')} {held / _GIB:.3g}"
            for name, held in asdict(memory).items()
            if held
        )
        policy, reference = self.loaded
        whose = f"the model, {policy / _GIB:.3g} GiB"
        if reference:
            whose += f", and the reference, {reference / _GIB:.3g} GiB"
        loading = 1 if self.loads_once else self.node_processes
        who = "the first process of all" if self.loads_once else "each"
        host = loading * (policy + reference) / _GIB
        hours, rate = self.hours_here()
        kind = "CPU" if on_cpu else "GPU"
        cache = self.reference.cache if self.reference is not None else None
        return [
            ("model", f"{self.model}, {self.shape.parameters / 1e6:,.1f} M parameters"),
            (
                "texts",
                f"{self.lengths.size:,}, {self.lengths.sum():,} tokens; "
                f"mean {self.lengths.mean():,.0f}, longest {self.lengths.max():,}",
            ),
            (
                "steps",
                f"{self.batches.steps:,}, each of {self.batches.described}; "
                f"{self.tokens:,.0f} tokens in all",
            ),
            ("memory", f"{memory.total / _GIB:.3g} GiB on a {kind} at the peak ({parts})"),
            (
                "main memory",
                f"{host:.3g} GiB at the start on a node of {self.node_processes} processes: "
                f"{who} loads {whose}",
            ),
            (
                "here",
                f"{_time(hours)} on this {kind}, at {estimate.UTILISATION:.0%} of the "
                f"{rate / 1e12:.3g} TFLOP/s measured on it",
            ),
            *([("reference cache", self._saved_by(cache))] if cache is not None else []),
        ]

    def _saved_by(self, cache: Path) -> str:
        """What a folder of log-probabilities takes, and what it saves."""
        pairs = len(self.lengths)
        taken = math.ceil(pairs * BYTES_A_PAIR / 1e6)
        without = copy(self)
        without.reference = None
        less = 1 - without.operations() / self.operations()
        return (
            f"at most {taken:,} MB for {pairs:,} pairs in {cache}; a run that finds them all there "
            f"takes {less:.0%} less time than is said here"
        )

    def _devices(self) -> Table:
        table = Table("GPU", "GiB", "fits", "GPUs needed", "time")
        too_many = "cannot" if self.method.in_4bit else "over 64"
        for device in DEVICES:
            fits = estimate.fits(device, self.memory(self.sharded_over))
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


def policy_plan(
    training: PolicyTraining,
    folder: Path,
    texts: Texts,
    *,
    facts: Sequence[tuple[str, str]] = (),
    reference: ReferenceUse | None = None,
) -> Plan:
    """A run of sft or align.

    Args:
        folder: of the model.
        facts, reference: as of Plan.
    """
    method = Method(
        # What is planned for is a GPU, which computes in bfloat16 unless told not to.
        bfloat16=training.dtype != "float32",
        lora_rank=training.lora_rank if training.lora else None,
        in_4bit=training.load_in_4bit,
        checkpointing=training.gradient_checkpointing,
        accumulation=training.gradient_accumulation,
        packed=training.share_prompts and training.sharding != "zero3",
    )
    in_rows = method.packed and training.sharding != "fsdp2"
    each = f"{training.batch_size} x {training.gradient_accumulation}"
    batches = Batches(
        size=training.batch_size,
        of_step=rows_a_step(training),
        steps=total_steps(training, len(texts.lengths)),
        described=f"{each} x {processes(training.world_size)} rows (a device x accumulated x "
        "processes)",
        row_limit=lambda device: row_tokens(device) if in_rows else None,
    )
    return Plan(
        training,
        Shape.read(folder, training.lora_targets),
        method,
        texts,
        batches,
        sharding=training.sharding,
        facts=facts,
        reference=reference,
        loads_once=training.sharding == "fsdp2",
    )


def _shared(texts: Texts) -> NDArray[np.int64]:
    """Tokens of each item that are read once for all of its texts; few are read again."""
    return np.where(texts.shared >= LEAST_SHARED, texts.shared, 0)


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.1 else f"{math.ceil(hours * 60)} min"
