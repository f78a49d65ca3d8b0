"""`cwpo plan`: what a job needs and costs, before it is run."""

from __future__ import annotations

import json
from dataclasses import asdict

from pydantic import Field
from pydantic_settings import CliSubCommand
from rich.console import Console
from rich.table import Table

from cwpo.capacity import PEAK_TFLOPS, AnnotationPlan, plan_annotation
from cwpo.cli import AsJson, Command

_HOURS_OF_DAY = 24
_GIGABYTE, _TERABYTE = 1e9, 1e12


class PlanAnnotation(Command):
    """Say what a batch job needs: hours of GPUs, workers, requests, Redis, store, and its cost.

    It is computed from a few measured rates; nothing is run, and no service is asked.

    Example:
        cwpo plan annotate --rows 1e9 --tokens 400 --gpu h100 --gpus 8 --gpu-hour 2.5
    """

    rows: float = Field(gt=0, description="Number of triplets, such as 1e9.")
    tokens: float = Field(
        400, gt=0, description="Tokens of a triplet: of its prompt once, and of both responses."
    )
    parameters: float = Field(
        358e6,
        gt=0,
        description="Parameters of the annotator without its embeddings: 358e6 of Qwen2.5-0.5B, "
        "106e6 of SmolLM2-135M, 85e6 of OPT-125M.",
    )
    gpu: str = Field("h100", description=f"GPU: {', '.join(sorted(PEAK_TFLOPS))}.")
    gpus: int = Field(1, ge=1, description="Number of GPUs, each with a replica of the service.")
    gpu_hour: float | None = Field(
        None, gt=0, description="Price of one GPU for an hour; without it, no cost is told."
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Print the plan."""
        plan = plan_annotation(
            rows=self.rows,
            tokens=self.tokens,
            parameters=self.parameters,
            gpu=self.gpu,
            gpus=self.gpus,
            gpu_hour=self.gpu_hour,
        )
        if self.json_:
            print(json.dumps(asdict(plan), indent=2))
            return
        table = Table(box=None, show_header=False)
        for name, value in _lines(plan, self.gpu):
            table.add_row(name, value)
        Console(highlight=False).print(table)


class Plan(Command):
    """Say what a step needs and costs, before it is run.

    Trainings tell the same with their own --dry-run.

    Example:
        cwpo plan annotate --rows 1e9 --tokens 400 --gpu h100
    """

    annotate: CliSubCommand[PlanAnnotation]


def _lines(plan: AnnotationPlan, gpu: str) -> list[tuple[str, str]]:
    scaled = f" (measured on h100, scaled to {gpu} by their peaks)" if plan.is_scaled else ""
    lines = [
        ("triplets/s", f"{plan.per_second:,.0f}{scaled}"),
        ("time", _duration(plan.hours)),
        ("GPU hours", f"{plan.hours * plan.gpus:,.1f}"),
        ("cores of workers", f"{plan.worker_cores:,}"),
        ("cores of the service", f"{plan.service_cores:,}"),
        ("requests", f"{plan.requests:,}"),
        ("Redis", f"{plan.redis_bytes / 1e6:.0f} MB for the shards"),
        ("store", _bytes(plan.store_bytes)),
    ]
    if plan.cost is not None and plan.cost_per_million is not None:
        lines.append(("cost", f"{plan.cost:,.2f}; {plan.cost_per_million:,.2f} a million triplets"))
    return lines


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    if hours < 2 * _HOURS_OF_DAY:
        return f"{hours:,.1f} hours"
    return f"{hours / _HOURS_OF_DAY:,.1f} days"


def _bytes(count: float) -> str:
    if count < _TERABYTE:
        return f"{count / _GIGABYTE:,.1f} GB"
    return f"{count / _TERABYTE:,.1f} TB"
