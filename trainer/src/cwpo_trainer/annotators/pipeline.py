"""Step (i): from human labels to an annotator's checkpoint folder.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.train_annotator`, with the flags of
`cwpo train-annotator`; --batch-size is then that of all processes together.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cwpo.errors import ConfigError, DatasetError
from cwpo.types import ItemError
from cwpo_annotator import Annotator
from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.checkpoint import (
    IMPLICIT,
    CalibrationBin,
    Card,
    CheckpointError,
    HeldOut,
    Objective,
    resolve,
    write_card,
)
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.responses import encoder_of
from cwpo_trainer.annotators.checkpoints import Checkpoints
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.planning import plan
from cwpo_trainer.annotators.ranks import connected_ranks
from cwpo_trainer.annotators.stages import AnnotatorStages
from cwpo_trainer.annotators.train_loop import TrainLoop
from cwpo_trainer.annotators.validation import Validation
from cwpo_trainer.cards.annotator_card import write_annotator_card
from cwpo_trainer.data.labelled import LabelledPair, fingerprint, prompt_key, read_pairs
from cwpo_trainer.data.labelled_prompts import LabelledPrompts
from cwpo_trainer.data.left_out import left_out
from cwpo_trainer.data.splits import Split, sample, split, validation_split, write_splits
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.evaluation.agreement import measure
from cwpo_trainer.plan.dry_run import Plan
from cwpo_trainer.run import process
from cwpo_trainer.run.chunks import chunks
from cwpo_trainer.run.folder import RunFolder, new_run_folder
from cwpo_trainer.run.resumption import checkpoint_to_resume
from cwpo_trainer.settings.annotator_training import (
    AnnotatorData,
    AnnotatorShardingName,
    AnnotatorTraining,
)

_ENCODED_AT_ONCE = 4096


def train_annotator(settings: AnnotatorTraining) -> None:
    """Split, train, measure on the held-out pairs and write the checkpoint folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    if not settings.dry_run:
        process.expect_world_size(settings.world_size)
        _check_launch(settings.sharding)
    unused = UnusedRows(settings.max_rejected_share)
    parts = _parts(settings, unused, seed=settings.seed)
    training, validating = validation_split(
        parts.labelled, settings.validation_fraction, seed=settings.seed
    )
    base = resolve(settings.model, weights=not settings.dry_run)
    if settings.dry_run:
        unused.tell(are_listed=False)
        _plan(settings, base, training, validating, parts.held_out).show()
        return
    recorded = settings.model_dump(mode="json")
    with new_run_folder(
        "train-annotator", settings.output, recorded, resume=settings.resume
    ) as output:
        unused.report(output)
        if settings.splits is not None and process.is_main():
            write_splits(parts, settings.splits, seed=settings.seed)
        process.prepare(seed=settings.seed, threads=settings.threads)
        encoder = _encoder(settings.objective, base, settings.model, settings.max_length)
        pairs = _Pairs(encode(encoder, training), encode(encoder, validating))
        _report_lengths(output, pairs, encoder.max_length, asked=settings.max_length)
        checkpoint = checkpoint_to_resume(output, settings.data)
        share_model = settings.sharding == "fsdp2"
        with connected_ranks(best_device(), share_model=share_model) as ranks:
            loop = TrainLoop(
                optimisation=settings,
                batch_size=settings.batch_size,
                schedule=settings.schedule,
                seed=settings.seed,
                save_steps=settings.save_steps,
                ranks=ranks,
                budget=PassBudget(
                    settings.token_budget, ranks.device.type, repeats=not share_model
                ),
                checkpoints=Checkpoints(output.path, checkpoint),
            )
            model, validation = AnnotatorStages(
                base=base,
                layers=settings.layers,
                lora=settings,
                checkpointing=settings.gradient_checkpointing,
                objective=settings,
                stopping=settings,
                bfloat16=process.use_bfloat16(settings.dtype),
                loop=loop,
                folder=output.path,
                training=pairs.training.pairs,
                prompts=pairs.training.prompts,
                validating=pairs.validating.pairs,
            ).train(encoder)
            # Each process has halved its own.
            output.results["token_budget"] = ranks.least(loop.budget.tokens)
        if process.is_main():
            model.save_pretrained(output.path)
            encoder.save(output.path)
            card = _card(
                encoder,
                parts.labelled,
                validation,
                base_model=settings.model,
                objective=settings.objective,
                beta=settings.beta,
            )
            write_card(output.path, card)
            LabelledPrompts.of(parts.labelled).write(output.path)
            output.results |= {
                "best_step": validation.best_step,
                "temperature": validation.temperature,
            }
            if parts.held_out:
                _measure_held_out(output, card, parts.held_out)
            write_annotator_card(output, card)


def _plan(
    settings: AnnotatorTraining,
    base: Path,
    training: Sequence[LabelledPair],
    validating: Sequence[LabelledPair],
    held_out: Sequence[LabelledPair],
) -> Plan:
    process.prepare(seed=settings.seed, threads=settings.threads)
    encoder = _encoder(settings.objective, base, settings.model, settings.max_length)
    pairs, _, left_out = encode(encoder, training)
    kept = f"{len(pairs):,} to train on, {left_out.total():,} too long"
    others = f"{len(validating):,} to validate on, {len(held_out):,} held out"
    return plan(
        settings,
        base,
        pairs,
        facts=[("pairs", f"{kept}; {others}")],
        validating=encode(encoder, validating).pairs,
        held_out=encode(encoder, held_out).pairs,
    )


def _check_launch(sharding: AnnotatorShardingName) -> None:
    """Raises: ConfigError where one process alone is to share the model."""
    if sharding != "none" and process.world_size() == 1:
        raise ConfigError(
            f"--sharding {sharding}: several processes share the model; start them with "
            "`torchrun --nproc-per-node ... -m cwpo_trainer.train_annotator`"
        )


def _parts(data: AnnotatorData, unused: UnusedRows, *, seed: int) -> Split:
    """The labelled pairs that are used, split by conversation. Raises: DatasetError."""
    return split(
        sample(read_pairs(data.data, unused), data.max_pairs, seed=seed),
        labelled_fraction=data.labelled_fraction,
        held_out_fraction=data.held_out_fraction,
        seed=seed,
    )


def _encoder(objective: Objective, base: Path, model: str, max_length: int) -> Encoder:
    """The encoder that fits the objective, from the folder `base` of the model.

    Raises: CheckpointError where nothing ends a text.
    """
    encoder = encoder_of(objective).create(base, max_length=max_length)
    if not encoder.ends_texts:
        raise CheckpointError(
            f"{model}: the tokenizer has no EOS token and ends no text by itself: "
            "name one as eos_token in tokenizer_config.json"
        )
    return encoder


class EncodedPairs(NamedTuple):
    """Labelled pairs as the model reads them, `a` the chosen one.

    prompts: that of each pair; left_out: how many other pairs are left out for each reason.
    """

    pairs: list[EncodedPair]
    prompts: list[str]
    left_out: Counter[str]


class _Pairs(NamedTuple):
    training: EncodedPairs
    validating: EncodedPairs


def encode(encoder: Encoder, pairs: Sequence[LabelledPair]) -> EncodedPairs:
    """Token ids of each pair.

    Prompts that are too long lose their oldest tokens; pairs whose responses are too long are left
    out. Raises: DatasetError when no pair is left.
    """
    encoded: list[EncodedPair | ItemError] = []
    for chunk in chunks(pairs, _ENCODED_AT_ONCE, work="encode", unit="pairs"):
        encoded += encoder.encode_pairs([pair.triplet for pair in chunk], "prompt_left")
    kept = [item for item in encoded if isinstance(item, EncodedPair)]
    if pairs and not kept:
        raise DatasetError(f"no pair fits into --max-length {encoder.max_length:,} tokens")
    prompts = [
        prompt_key(pair.prompt)
        for pair, item in zip(pairs, encoded, strict=True)
        if isinstance(item, EncodedPair)
    ]
    left_out = Counter[str](item.code for item in encoded if isinstance(item, ItemError))
    return EncodedPairs(kept, prompts, left_out)


def _report_lengths(output: RunFolder, pairs: _Pairs, limit: int, *, asked: int) -> None:
    """Note how many pairs there are and how many did not fit, and tell the user.

    Args:
        limit: most tokens of a text; asked: what --max-length says, which a model may not reach.
    """
    kept = [*pairs.training.pairs, *pairs.validating.pairs]
    left_out_of_all = pairs.training.left_out + pairs.validating.left_out
    truncated = sum(pair.truncated for pair in kept)
    output.results |= {
        "pairs": len(pairs.training.pairs),
        "validation_pairs": len(pairs.validating.pairs),
        "pairs_too_long": left_out_of_all.total(),
        "prompts_truncated": truncated,
    }
    if not process.is_main():
        return
    if left_out_of_all:
        total = len(kept) + left_out_of_all.total()
        flag = "--max-length" if limit == asked else None
        print(left_out(left_out_of_all, total, limit=limit, flag=flag), file=sys.stderr)
    if truncated:
        print(
            f"{truncated:,} of {len(kept):,} pairs lost the oldest tokens of their prompt to fit "
            f"into {limit:,} tokens.",
            file=sys.stderr,
        )


def _card(
    encoder: Encoder,
    labelled: Sequence[LabelledPair],
    validation: Validation[Any],
    *,
    base_model: str,
    objective: Objective,
    beta: float,
) -> Card:
    """What annotator.json says of the annotator before it is measured."""
    if validation.pairs and validation.temperature is None:
        print(
            f"not calibrated: on the {len(validation.pairs):,} validation pairs the annotator is "
            "no better than chance",
            file=sys.stderr,
        )
    return Card(
        base_model=base_model,
        objective=objective,
        beta=beta if objective in IMPLICIT else None,
        encoding=encoder.spec,
        data_fingerprint=fingerprint(labelled),
        labelled_pairs=len(labelled),
        temperature=validation.temperature,
        calibration_pairs=len(validation.pairs) or None,
    )


def _measure_held_out(output: RunFolder, card: Card, held_out: Sequence[LabelledPair]) -> None:
    """Measure the written annotator on the held-out pairs; results and card keep the figures."""
    metrics = measure(Annotator.load(output.path), held_out)
    output.results["held_out"] = metrics.model_dump(mode="json")
    card.held_out = HeldOut(
        pairs=metrics.pairs,
        accuracy=metrics.accuracy,
        mean_confidence=metrics.mean_confidence,
        ece=metrics.ece,
        calibrated_ece=metrics.calibrated_ece,
        bins=[
            CalibrationBin(
                pairs=part.pairs,
                mean_confidence=part.mean_confidence,
                mean_calibrated_confidence=part.mean_calibrated_confidence,
                accuracy=part.accuracy,
            )
            for part in metrics.bins
        ],
    )
    card.confidence_quantiles = metrics.confidence_quantiles
    write_card(output.path, card)
    print(f"held out: {metrics.summary}")
