"""`cwpo train-annotator --dry-run`: what the training of an annotator would do and need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cwpo_annotator.backends.torch.rows.shared_prompts import has_decoder_head
from cwpo_annotator.checkpoint import IMPLICIT
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_trainer.annotators.base_model import outline
from cwpo_trainer.plan.dry_run import Batches, Plan, Reading, ReferenceUse, Texts
from cwpo_trainer.plan.estimate import Method, Shape
from cwpo_trainer.plan.row_sizes import row_tokens
from cwpo_trainer.plan.schedule import annotator_steps, processes
from cwpo_trainer.settings.annotator_training import AnnotatorTraining


def plan(
    settings: AnnotatorTraining,
    base: Path,
    pairs: Sequence[EncodedPair],
    facts: Sequence[tuple[str, str]] = (),
    *,
    validating: Sequence[EncodedPair] = (),
    held_out: Sequence[EncodedPair] = (),
) -> Plan:
    """What training an annotator on these pairs would do and need.

    Args:
        base: folder of the pretrained model.
        validating: pairs that the weights are chosen by.
        held_out: pairs that the written annotator is measured on.
        facts: names and values to show first.
    Raises: CheckpointError or ConfigError for a model that cannot be trained so.
    """
    is_implicit = settings.objective in IMPLICIT
    model = outline(base, scalar_head=not is_implicit, layers=settings.layers)
    shape = Shape.of(model, settings.lora_targets)
    method = Method(
        bfloat16=settings.dtype != "float32",
        lora_rank=settings.lora_rank if settings.lora else None,
        checkpointing=settings.gradient_checkpointing,
        packed=has_decoder_head(model),
        frozen_float32=True,
    )
    batches = Batches(
        size=math.ceil(settings.batch_size / processes(settings.world_size)),
        of_step=settings.batch_size,
        steps=_steps(settings, len(pairs), settings.epochs),
        described=f"{settings.batch_size} pairs over all processes",
        row_limit=lambda device: settings.token_budget or row_tokens(device),
        filled_to=1,
        alike=True,
    )
    every = settings.validate_every or math.ceil(len(pairs) / settings.batch_size)
    checks = math.ceil(batches.steps / every)
    before = None
    facts = [("objective", settings.objective), *facts]
    if validating:
        most = "at most " if settings.patience is not None else ""
        facts.append(("validation", f"{most}{checks:,} times, on {len(validating):,} pairs"))
    if settings.objective == "sft+dpo":
        steps = _steps(settings, len(pairs), settings.sft_epochs)
        facts.append(("SFT", f"{steps:,} steps on the chosen responses, before those of DPO"))
        before = Plan(
            settings,
            shape,
            method,
            _chosen(pairs),
            replace(batches, steps=steps),
            sharding=settings.sharding,
        )
    return Plan(
        settings,
        shape,
        method,
        _both(pairs, is_implicit=is_implicit),
        batches,
        sharding=settings.sharding,
        facts=facts,
        # Read once, by the model that training starts from.
        reference=ReferenceUse(False, is_precomputed=True) if is_implicit else None,
        before=before,
        readings=_readings(validating, held_out, checks=checks, is_implicit=is_implicit),
    )


def _readings(
    validating: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    *,
    checks: int,
    is_implicit: bool,
) -> list[Reading]:
    """Validation, and the measurement of what was written; an implicit reward has a reference."""
    reference = int(is_implicit)
    times = ((validating, checks + reference), (held_out, 1 + reference))
    return [
        Reading(_both(pairs, is_implicit=is_implicit), count) for pairs, count in times if pairs
    ]


def _steps(settings: AnnotatorTraining, pairs: int, epochs: float) -> int:
    return annotator_steps(
        pairs, batch_size=settings.batch_size, epochs=epochs, max_steps=settings.max_steps
    )


def _both(pairs: Sequence[EncodedPair], *, is_implicit: bool) -> Texts:
    """Both texts of each pair; a scalar head reads one token of each."""
    sizes = [
        (len(pair.a), len(pair.b), pair.start, common_prefix(pair.a, pair.b)) for pair in pairs
    ]
    a, b, start, shared = np.array(sizes, dtype=np.int64).T
    lengths = np.stack([a, b], axis=1)
    scored = lengths - start[:, None] if is_implicit else np.ones_like(lengths)
    return Texts(lengths, scored, shared)


def _chosen(pairs: Sequence[EncodedPair]) -> Texts:
    sizes = np.array([(len(pair.a), pair.start) for pair in pairs], dtype=np.int64)
    lengths = sizes[:, :1]
    return Texts(lengths, lengths - sizes[:, 1:], np.zeros(len(pairs), dtype=np.int64))
