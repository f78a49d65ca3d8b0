"""Step (iii), second half: alignment of the strong model on weighted preferences.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.align`, with the flags of `cwpo align`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset

from cwpo_annotator.checkpoint import resolve
from cwpo_trainer import launch, policy, preflight, runtime, weights
from cwpo_trainer.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.formatting import Formatter, TokenisedText
from cwpo_trainer.losses import REFERENCE_FREE
from cwpo_trainer.plan import Plan
from cwpo_trainer.record import Output, new_output
from cwpo_trainer.weighted import (
    Preferences,
    WeightedPair,
    evaluation_rows,
    read_human,
    read_weighted,
    weights_of,
)

if TYPE_CHECKING:
    from cwpo_trainer.commands import Align

# TRL's names where they differ from ours.
_LOSS_TYPES = {"dpo": "sigmoid", "rdpo": "robust"}
_WEIGHT_COLUMN = "weight"


def run(settings: Align) -> None:
    """Align and write the model folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    preflight.check(settings)
    preflight.check_loss(settings)
    preferences, evaluation = read(settings)
    runtime.prepare(seed=settings.seed, threads=settings.threads)
    if settings.dry_run:
        _plan(settings, preferences)
        return
    folder = resolve(settings.model)
    recorded = settings.model_dump(mode="json")
    with new_output("align", settings.output, recorded, resume=settings.resume) as output:
        tokenizer = policy.load_tokenizer(folder)
        formatter = Formatter(tokenizer)
        dataset = tokenised(preferences, formatter, settings.max_length, output)
        # Made first: under ZeRO-3 it decides how models are loaded.
        config = _config(settings, output, len(dataset))
        trainer = ConfidenceDPOTrainer(
            model=policy.load_for_training(settings),
            ref_model=policy.load_for_training(settings, settings.reference)
            if needs_reference(settings)
            else None,
            args=config,
            train_dataset=dataset,
            eval_dataset=evaluation
            and tokenised(evaluation, formatter, settings.max_length, output, "eval_"),
            processing_class=tokenizer,
            peft_config=policy.lora_config(settings),
        )
        policy.train(trainer, settings, output, _objective(settings))
        policy.save(trainer, settings, output.folder)
    policy.push(settings)


def _plan(settings: Align, preferences: Preferences) -> None:
    folder = resolve(settings.model, weights=False)
    output = Output("align", {}, settings.output)
    formatter = Formatter(policy.load_tokenizer(folder))
    dataset = tokenised(preferences, formatter, settings.max_length, output)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    prompt, chosen, rejected = (
        np.array([len(ids) for ids in dataset[column]], dtype=np.int64) for column in columns
    )
    Plan(
        settings,
        folder,
        np.stack([prompt + chosen, prompt + rejected], axis=1),
        np.stack([chosen, rejected], axis=1),
        with_reference=needs_reference(settings),
        reads_reference=_reads_reference(settings),
    ).show(
        [
            ("loss", _objective(settings)),
            (
                "pairs",
                f"{output.results['pairs']:,}, {output.results['pairs_too_long']:,} too long; "
                f"mean weight {output.results['mean_weight']:.3f}",
            ),
        ]
    )


def needs_reference(settings: Align) -> bool:
    """Whether a second model is held in memory while training.

    Where the reference is the start model, it is under LoRA the policy itself with its adapter
    switched off, and log-probabilities that are precomputed come from it before its first step.
    """
    if settings.loss in REFERENCE_FREE:
        return False
    if settings.reference is not None:
        return True
    return not settings.lora and not settings.precompute_reference


def _reads_reference(settings: Align) -> Literal["never", "once", "every step"]:
    if settings.loss in REFERENCE_FREE:
        return "never"
    return "once" if settings.precompute_reference else "every step"


def read(settings: Align) -> tuple[Preferences, Preferences | None]:
    """The pairs to train on, and any to evaluate on, with their weights. Raises: DatasetError."""
    preferences = _preferences(settings, settings.data)
    if settings.eval_data is not None:
        return preferences, _preferences(settings, settings.eval_data)
    if not settings.eval_fraction:
        return preferences, None
    kept = evaluation_rows(preferences.pairs, settings.eval_fraction, seed=settings.seed)
    return preferences.only(~kept), preferences.only(kept)


def _preferences(settings: Align, path: Path) -> Preferences:
    """The pairs of a file. Those that `top` leaves out are not read by the model at all."""
    if settings.labels == "human":
        pairs = read_human(path)
        return Preferences(pairs, weights.none(len(pairs)))
    pairs = read_weighted(path, calibrated=settings.calibrated)
    of_pairs = weights_of(
        pairs,
        settings.weight,
        normalise=settings.normalise and settings.weight != "top",
        top_percent=settings.top_percent,
        exponent=settings.exponent,
    )
    preferences = Preferences(pairs, of_pairs)
    return preferences.only(of_pairs > 0) if settings.weight == "top" else preferences


def tokenised(
    preferences: Preferences,
    formatter: Formatter,
    max_length: int,
    output: Output,
    part: str = "",
) -> Dataset:
    """The columns prompt_ids, chosen_ids, rejected_ids and weight.

    Pairs with a text over max_length tokens are left out rather than cut, and counted in the
    results, under names that start with `part`. Raises: DatasetError when none is left.
    """
    pairs_and_weights = list(zip(preferences.pairs, preferences.weights.tolist(), strict=True))

    def rows(some: Sequence[tuple[WeightedPair, float]]) -> list[dict[str, Any]]:
        prompts = [pair.prompt for pair, _ in some]
        chosen = formatter.tokenise(prompts, [pair.chosen for pair, _ in some])
        rejected = formatter.tokenise(prompts, [pair.rejected for pair, _ in some])
        return [
            _row(of_chosen, of_rejected) | {_WEIGHT_COLUMN: weight}
            for of_chosen, of_rejected, (_, weight) in zip(chosen, rejected, some, strict=True)
            if max(of_chosen.tokens, of_rejected.tokens) <= max_length
        ]

    dataset = policy.dataset_of(pairs_and_weights, rows, max_length, output, part)
    used = np.asarray(dataset.with_format("numpy")[_WEIGHT_COLUMN][:])
    output.results |= {
        f"{part}mean_weight": float(used.mean()),
        f"{part}max_weight": float(used.max()),
    }
    return dataset


def _row(chosen: TokenisedText, rejected: TokenisedText) -> dict[str, list[int]]:
    # Where tokens merge across the seam, both responses start at the earlier place.
    shared = min(len(chosen.prompt_ids), len(rejected.prompt_ids))
    return {
        "prompt_ids": chosen.prompt_ids[:shared],
        "chosen_ids": chosen.prompt_ids[shared:] + chosen.response_ids,
        "rejected_ids": rejected.prompt_ids[shared:] + rejected.response_ids,
    }


def _objective(settings: Align) -> str:
    weight = "human labels" if settings.labels == "human" else f"weight {settings.weight}"
    return f"{settings.loss}, {weight}"


def _config(settings: Align, output: Output, rows: int) -> ConfidenceDPOConfig:
    return ConfidenceDPOConfig(
        **policy.training_arguments(settings, output.folder, rows),
        loss_type=[_LOSS_TYPES.get(settings.loss, settings.loss)],
        beta=settings.tau if settings.loss == "ipo" else settings.beta,
        label_smoothing=settings.epsilon if settings.loss in ("rdpo", "cdpo") else 0.0,
        ipo_length_normalised=settings.ipo_length_normalised,
        simpo_gamma=settings.gamma,
        precompute_ref_log_probs=settings.precompute_reference,
        weight_column=_WEIGHT_COLUMN,
    )


if __name__ == "__main__":
    from cwpo_trainer.commands import Align

    launch.main(Align, "python -m cwpo_trainer.align")
