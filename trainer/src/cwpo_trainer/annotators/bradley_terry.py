"""Step (i): training a pretrained model as a Bradley-Terry annotator (eq. 5)."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import get_scheduler

from cwpo.errors import DatasetError
from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.torch import best_device
from cwpo_annotator.checkpoint import Card, HeldOut, resolve, write_card
from cwpo_annotator.encoding import Encoder
from cwpo_trainer import data, losses, runtime
from cwpo_trainer.annotators.model import add_lora, load, merge_lora
from cwpo_trainer.annotators.scorer import Scorer
from cwpo_trainer.annotators.validation import Validation
from cwpo_trainer.data import LabelledPair, Split
from cwpo_trainer.evaluation import annotator as evaluation
from cwpo_trainer.record import LOG_NAME, Output, new_output
from cwpo_trainer.training_log import TrainingLog

if TYPE_CHECKING:
    from cwpo_trainer.commands import TrainAnnotator

MAX_GRAD_NORM = 1.0


def run(settings: TrainAnnotator) -> None:
    """Split, train, measure on the held-out pairs and write the checkpoint folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    parts = data.split(
        data.sample(data.read_pairs(settings.data), settings.max_pairs, seed=settings.seed),
        labelled_fraction=settings.labelled_fraction,
        held_out_fraction=settings.held_out_fraction,
        seed=settings.seed,
    )
    training, validating = data.validation_split(
        parts.labelled, settings.validation_fraction, seed=settings.seed
    )
    base = resolve(settings.model)
    recorded = settings.model_dump(mode="json")
    with new_output("train-annotator", settings.output, recorded) as output:
        if settings.splits is not None:
            data.write_splits(parts, settings.splits, seed=settings.seed)
        runtime.prepare(seed=settings.seed, threads=settings.threads)
        encoder = Encoder.create(base, max_length=settings.max_length)
        pairs, kept_back = encode(encoder, training), encode(encoder, validating)
        report_lengths(output, len(parts.labelled), pairs, kept_back)
        validation = Validation(kept_back, settings.patience)
        model = load(base, encoder, layers=settings.layers)
        if settings.lora:
            add_lora(
                model,
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
            )
        scorer = Scorer(
            model.to(best_device()),
            encoder.pad_token_id,
            bfloat16=runtime.use_bfloat16(settings.dtype),
        )
        with TrainingLog(output.folder / LOG_NAME, "annotator") as log:
            train(scorer, pairs, validation, settings, log)
        scorer.restore()
        if settings.lora:
            merge_lora(model)
        _save(model, encoder, settings, parts, validation, output)


def encode(encoder: Encoder, pairs: Sequence[LabelledPair]) -> list[EncodedPair]:
    """Token ids of each pair, `a` the chosen one.

    Prompts that are too long lose their oldest tokens; pairs whose responses are too long are left
    out. Raises: DatasetError when no pair is left.
    """
    triplets = [
        Triplet(id=pair.id, prompt=pair.prompt, response_a=pair.chosen, response_b=pair.rejected)
        for pair in pairs
    ]
    encoded = encoder.encode_pairs(triplets, "prompt_left")
    kept = [item for item in encoded if isinstance(item, EncodedPair)]
    if pairs and not kept:
        raise DatasetError(f"no pair fits into --max-length {encoder.max_length:,} tokens")
    return kept


def report_lengths(
    output: Output, labelled: int, training: list[EncodedPair], validation: list[EncodedPair]
) -> None:
    """Say how many pairs there are, and which did not fit, in the results and to the user."""
    left_out = labelled - len(training) - len(validation)
    truncated = sum(pair.truncated for pair in (*training, *validation))
    output.results |= {
        "pairs": len(training),
        "validation_pairs": len(validation),
        "pairs_too_long": left_out,
        "prompts_truncated": truncated,
    }
    if truncated or left_out:
        print(
            f"of {labelled:,} pairs, {truncated:,} prompts were cut to --max-length "
            f"and {left_out:,} pairs with longer responses left out",
            file=sys.stderr,
        )


def train(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    validation: Validation,
    settings: TrainAnnotator,
    log: TrainingLog,
) -> None:
    """Train with AdamW on eq. 5, a random batch of pairs at a time; the best weights are kept."""
    model = scorer.model
    steps_an_epoch = -(-len(pairs) // settings.batch_size)
    steps = settings.max_steps or max(1, round(settings.epochs * steps_an_epoch))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    scheduler = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=min(settings.warmup_steps, steps // 10),
        num_training_steps=steps,
    )
    check_every = settings.validate_every or steps_an_epoch
    model.train()
    log.start(steps)
    for step, batch in enumerate(_batches(pairs, settings.batch_size, steps, settings.seed), 1):
        figures = _backward(scorer, batch, settings)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if validation.pairs and (step % check_every == 0 or step == steps):
            figures |= validation.check(step, scorer.measure(validation.pairs), model)
        log.step(step=step, lr=lr, grad_norm=norm.item(), **figures)
        if validation.is_over:
            break
    validation.restore(model)


def _backward(
    scorer: Scorer, batch: Sequence[EncodedPair], settings: TrainAnnotator
) -> dict[str, float]:
    """Gradients of the mean loss over the batch; the loss and the share of pairs told right."""
    loss = 0.0
    correct = 0
    for margins in scorer.margins(batch):
        each = losses.bradley_terry(
            margins, margin=settings.margin, label_smoothing=settings.label_smoothing
        )
        part = each.sum() / len(batch)
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
        correct += int((margins > 0).sum())
    return {"loss": loss, "accuracy": correct / len(batch)}


def _batches(
    pairs: Sequence[EncodedPair], size: int, count: int, seed: int
) -> Iterator[list[EncodedPair]]:
    """`count` batches, from one shuffled pass over the pairs after the other."""
    generator = random.Random(seed)  # noqa: S311
    order: list[EncodedPair] = []
    for _ in range(count):
        if not order:
            order = list(pairs)
            generator.shuffle(order)
        yield order[:size]
        del order[:size]


def _save(
    model: Any,
    encoder: Encoder,
    settings: TrainAnnotator,
    parts: Split,
    validation: Validation,
    output: Output,
) -> None:
    """Write weights, tokenizer and card, and measure what was written on the held-out pairs."""
    model.save_pretrained(output.folder)
    encoder.save(output.folder)
    card = Card(
        base_model=settings.model,
        objective=settings.objective,
        encoding=encoder.spec,
        data_fingerprint=data.fingerprint(parts.labelled),
        labelled_pairs=len(parts.labelled),
        temperature=validation.temperature,
        calibration_pairs=len(validation.pairs) or None,
    )
    output.results |= {"best_step": validation.best_step, "temperature": validation.temperature}
    if validation.pairs and validation.temperature is None:
        print(
            f"not calibrated: on the {len(validation.pairs):,} validation pairs the annotator is "
            "no better than chance",
            file=sys.stderr,
        )
    write_card(output.folder, card)
    if parts.held_out:
        metrics = evaluation.measure(Annotator.load(output.folder), parts.held_out)
        output.results["held_out"] = metrics.model_dump(mode="json")
        card.held_out = HeldOut(
            pairs=metrics.pairs,
            accuracy=metrics.accuracy,
            mean_confidence=metrics.mean_confidence,
            ece=metrics.ece,
            calibrated_ece=metrics.calibrated_ece,
        )
        card.confidence_quantiles = metrics.confidence_quantiles
        write_card(output.folder, card)
        print(f"held out: {metrics.summary}")
