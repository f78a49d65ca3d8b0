"""Step (i): training a pretrained model on human labels as an annotator.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.train_annotator`, with the flags of
`cwpo train-annotator`; --batch-size is then that of all processes together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cwpo.errors import ConfigError, DatasetError
from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.in_process import best_device
from cwpo_annotator.checkpoint import (
    IMPLICIT,
    REFERENCE_NAME,
    Card,
    CheckpointError,
    HeldOut,
    resolve,
    write_card,
)
from cwpo_annotator.encoding import Encoder
from cwpo_annotator.responses import encoder_of
from cwpo_trainer import data, launch, losses, runtime
from cwpo_trainer.annotators import model as models
from cwpo_trainer.annotators.checkpoints import Checkpoints
from cwpo_trainer.annotators.implicit import ImplicitScorer, ResponseScorer
from cwpo_trainer.annotators.ranks import together
from cwpo_trainer.annotators.scorer import Scorer
from cwpo_trainer.annotators.training import Run, Stage, steps_of, train
from cwpo_trainer.annotators.validation import Validation
from cwpo_trainer.data import LabelledPair, Split
from cwpo_trainer.evaluation import annotator as evaluation
from cwpo_trainer.interruption import checkpoint_to_resume
from cwpo_trainer.record import LOG_NAME, SFT_LOG_NAME, Output, new_output

if TYPE_CHECKING:
    from cwpo_trainer.commands import TrainAnnotator


def run(settings: TrainAnnotator) -> None:
    """Split, train, measure on the held-out pairs and write the checkpoint folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    runtime.expect_world_size(settings.world_size)
    if settings.margin and settings.objective != "bt":
        raise ConfigError(f"--margin belongs to --objective bt; {settings.objective} has none")
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
    with new_output("train-annotator", settings.output, recorded, resume=settings.resume) as output:
        if settings.splits is not None and runtime.is_main():
            data.write_splits(parts, settings.splits, seed=settings.seed)
        runtime.prepare(seed=settings.seed, threads=settings.threads)
        encoder = encoder_of(settings.objective).create(base, max_length=settings.max_length)
        if not encoder.ends_texts:
            raise CheckpointError(
                f"{settings.model}: the tokenizer has no EOS token and ends no text by itself: "
                "name one as eos_token in tokenizer_config.json"
            )
        pairs, kept_back = encode(encoder, training), encode(encoder, validating)
        report_lengths(output, len(parts.labelled), pairs, kept_back)
        validation = Validation(kept_back, settings.patience)
        checkpoints = Checkpoints(output.folder, checkpoint_to_resume(settings, output))
        how = _train_implicit if settings.objective in IMPLICIT else _train_scalar
        with together(best_device()) as ranks:
            model = how(
                Run(settings, output.folder, ranks, checkpoints), encoder, pairs, validation
            )
        if runtime.is_main():
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
    if (truncated or left_out) and runtime.is_main():
        print(
            f"of {labelled:,} pairs, {truncated:,} prompts were cut to --max-length "
            f"and {left_out:,} pairs with longer responses left out",
            file=sys.stderr,
        )


def _train_scalar(
    run: Run, encoder: Encoder, pairs: Sequence[EncodedPair], validation: Validation
) -> Any:
    """A model with a scalar head, trained on scores of single texts (bt) or joint ones (pairrm)."""
    settings = run.settings

    def loss(scores: Tensor) -> Tensor:
        a, b = scores[:, 0], scores[:, 1]
        smoothing = settings.label_smoothing
        if settings.objective == "pairrm":
            return losses.pairwise(a, b, label_smoothing=smoothing)
        return losses.bradley_terry(a - b, margin=settings.margin, label_smoothing=smoothing)

    model = models.load(resolve(settings.model), encoder, layers=settings.layers)
    _add_lora(model, settings)
    bfloat16 = runtime.use_bfloat16(settings.dtype)
    scorer = Scorer(model.to(best_device()), encoder.pad_token_id, bfloat16=bfloat16)
    log = run.folder / LOG_NAME
    train(Stage("annotator", scorer, loss, pairs, validation, settings.epochs, log), run)
    scorer.restore()
    return _merged(model, settings)


def _train_implicit(
    run: Run, encoder: Encoder, pairs: Sequence[EncodedPair], validation: Validation
) -> Any:
    """A language model trained by DPO, after SFT where asked; its reference is written."""
    settings, reference = run.settings, run.folder / REFERENCE_NAME

    def loss(scores: Tensor) -> Tensor:
        # DPO, eq. 9 with C = 1, is eq. 5 over implicit rewards.
        margins = scores[:, 0] - scores[:, 1]
        return losses.bradley_terry(margins, label_smoothing=settings.label_smoothing)

    is_resumed = run.checkpoints.resumed_in("annotator")
    start = reference if is_resumed else resolve(settings.model)
    model = models.load_causal(start, layers=settings.layers).to(best_device())
    sft_steps = 0
    if settings.objective == "sft+dpo":
        sft_steps = steps_of(settings, len(pairs), settings.sft_epochs)
        if not is_resumed:
            _fine_tune(model, run, pairs)
    if not is_resumed and runtime.is_main():
        model.save_pretrained(reference)
    _add_lora(model, settings)
    bfloat16 = runtime.use_bfloat16(settings.dtype)
    scorer = ImplicitScorer(model, beta=settings.beta, bfloat16=bfloat16)
    scorer.refer(pairs, validation.pairs)
    log = run.folder / LOG_NAME
    stage = Stage("annotator", scorer, loss, pairs, validation, settings.epochs, log, sft_steps)
    train(stage, run)
    scorer.restore()
    return _merged(model, settings)


def _fine_tune(model: Any, run: Run, pairs: Sequence[EncodedPair]) -> None:
    """Raise the log-probability of the chosen responses: SFT, before DPO."""
    settings = run.settings
    chosen = [replace(pair, b=pair.a, shared=len(pair.a)) for pair in pairs]
    _add_lora(model, settings)
    scorer = ResponseScorer(model, bfloat16=runtime.use_bfloat16(settings.dtype))
    nothing = Validation([], None)
    log = run.folder / SFT_LOG_NAME
    epochs = settings.sft_epochs
    train(Stage("SFT", scorer, lambda s: -s[:, 0], chosen, nothing, epochs, log), run)
    scorer.restore()
    _merged(model, settings)


def _add_lora(model: Any, settings: TrainAnnotator) -> None:
    if settings.lora:
        models.add_lora(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
        )


def _merged(model: Any, settings: TrainAnnotator) -> Any:
    if settings.lora:
        models.merge_lora(model)
    return model


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
        beta=settings.beta if settings.objective in IMPLICIT else None,
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


if __name__ == "__main__":
    from cwpo_trainer.commands import TrainAnnotator

    launch.main(TrainAnnotator, "python -m cwpo_trainer.train_annotator")
