"""Step (iii), second half: alignment of the strong model on weighted preferences.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.align`, with the flags of `cwpo align`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from cwpo_annotator.checkpoint import base_folder, resolve
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_trainer import weights
from cwpo_trainer.data.weighted import (
    Preferences,
    WeightedPair,
    read_human,
    read_weighted,
    read_with_evaluation,
    weights_of,
)
from cwpo_trainer.losses import LOSSES
from cwpo_trainer.plan.dry_run import Plan, ReferenceUse
from cwpo_trainer.policy import preflight
from cwpo_trainer.policy.adapters import going_on, new_adapter
from cwpo_trainer.policy.arguments import evaluation_arguments, training_arguments
from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.policy.dataset import Fitting, fitting, named
from cwpo_trainer.policy.end_of_turn import end_turns
from cwpo_trainer.policy.formatting import Formatter, TokenisedText
from cwpo_trainer.policy.loading import load_for_training, load_tokenizer
from cwpo_trainer.policy.saving import push, save
from cwpo_trainer.policy.trl_training import train
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import new_run_folder
from cwpo_trainer.settings.policy_training import (
    Alignment,
    Labels,
    PairLoss,
    PolicyTraining,
    Weighting,
)
from cwpo_trainer.weights import WEIGHTS

_WEIGHT_COLUMN = "weight"


def align(settings: Alignment) -> None:
    """Align the model and write its folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    preflight.check(settings)
    preflight.check_loss(settings)
    preflight.check_weighting(settings, settings.labels)
    preferences, evaluation = read_with_evaluation(
        partial(_preferences, labels=settings.labels, weighting=settings),
        settings.data,
        eval_data=settings.eval_data,
        eval_fraction=settings.eval_fraction,
        seed=settings.seed,
    )
    process.prepare(seed=settings.seed, threads=settings.threads)
    start = resolve(settings.model, weights=not settings.dry_run)
    settings = going_on(settings, start)
    by_prompt = preferences.has_prompt_pairs and settings.weight_by == "prompt"
    objective = _objective(settings.loss, settings.labels, settings.weight, by_prompt=by_prompt)
    if settings.dry_run:
        tokenizer = load_tokenizer(start)
        pairs = tokenised(preferences, Formatter(tokenizer), settings.max_length)
        plan(settings, pairs, objective, reference_use(settings, lora=settings.lora)).show()
        return
    # Without effect on triplets, where a run of a version without this setting can be resumed.
    unused = set() if preferences.has_prompt_pairs else {"weight_by"}
    recorded = settings.model_dump(mode="json", exclude=unused)
    with new_run_folder("align", settings.output, recorded, resume=settings.resume) as output:
        tokenizer = load_tokenizer(start)
        formatter = Formatter(tokenizer)
        pairs = tokenised(preferences, formatter, settings.max_length)
        output.results |= pairs.results
        if preferences.has_prompt_pairs:
            output.results["weight_by"] = settings.weight_by
        evaluated = None
        if evaluation is not None:
            evaluated = tokenised(evaluation, formatter, settings.max_length)
            output.results |= named(evaluated.results, "eval")
        # Made first: under ZeRO-3 it decides how models are loaded.
        config = ConfidenceDPOConfig(
            **training_arguments(settings, output.path, len(pairs.dataset)),
            **evaluation_arguments(settings),
            **loss_arguments(settings),
            share_prompts=settings.share_prompts,
            report_to=settings.report_to,
        )
        bfloat16 = process.use_bfloat16(settings.dtype)
        use = reference_use(settings, lora=settings.lora)

        def loaded(model: str, adapter_dropout: float | None = None) -> Any:
            return load_for_training(
                model,
                is_frozen=settings.lora,
                bfloat16=bfloat16,
                in_4bit=settings.load_in_4bit,
                adapter_dropout=adapter_dropout,
            )

        policy = loaded(settings.model, settings.lora_dropout)
        output.results |= end_turns(policy, tokenizer)
        trainer = ConfidenceDPOTrainer(
            model=policy,
            ref_model=loaded(settings.reference or settings.model)
            if use is not None and use.is_second_model
            else None,
            args=config,
            train_dataset=pairs.dataset,
            eval_dataset=evaluated.dataset if evaluated is not None else None,
            processing_class=tokenizer,
            peft_config=new_adapter(policy, settings),
        )
        for name, pairs_found in trainer.pairs_from_cache.items():
            found = {"pairs_from_reference_cache": pairs_found}
            output.results |= found if name == "train" else named(found, name)
        train(trainer, output, settings.data, objective)
        output.results |= save(
            trainer,
            output.path,
            adapts=settings.model if settings.lora else None,
            adapter_only=settings.adapter_only,
        )
    push(settings.output, settings.push_to_hub)


def plan(
    training: PolicyTraining,
    pairs: WeightedFitting,
    objective: str,
    reference: ReferenceUse | None,
) -> Plan:
    """What aligning on these pairs would do and need.

    Args:
        objective: loss and weight, for the user.
        reference: None for a loss without one.
    """
    columns = [pairs.dataset[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    prompt, chosen, rejected = (np.array([*map(len, of)], dtype=np.int64) for of in columns)
    begin_alike = [*map(common_prefix, *columns[1:])]
    return Plan(
        training,
        base_folder(resolve(training.model, weights=False), weights=False),
        np.stack([prompt + chosen, prompt + rejected], axis=1),
        np.stack([chosen, rejected], axis=1),
        prompt + np.array(begin_alike, dtype=np.int64),
        facts=[
            ("loss", objective),
            (
                "pairs",
                f"{len(pairs.dataset):,}, {pairs.too_long:,} too long; "
                f"mean weight {pairs.mean_weight:.3f}",
            ),
        ],
        reference=reference,
    )


def reference_use(loss: PairLoss, *, lora: bool) -> ReferenceUse | None:
    """How the reference is read while training; None for a loss that has none.

    Where the reference is the start model, it is under LoRA the policy itself with its adapter
    switched off, and log-probabilities that are precomputed come from it before its first step.
    """
    if not loss.reads_reference:
        return None
    is_start = loss.reference is None
    return ReferenceUse(
        is_second_model=not (is_start and (lora or loss.precomputes_reference)),
        is_precomputed=loss.precomputes_reference,
    )


def _preferences(path: Path, *, labels: Labels, weighting: Weighting) -> Preferences:
    """The pairs of a file with their weights; of a weight that selects pairs, those selected."""
    if labels == "human":
        pairs = read_human(path)
        return Preferences(pairs, weights.none(len(pairs)))
    pairs = read_weighted(path, calibrated=weighting.calibrated)
    weight = WEIGHTS[weighting.weight]
    constants = {each.argument: getattr(weighting, each.flag) for each in weight.constants}
    of_pairs = weights_of(
        pairs,
        weighting.weight,
        normalise=weighting.normalise,
        by_prompt=weighting.weight_by == "prompt",
        **constants,
    )
    preferences = Preferences(pairs, of_pairs)
    return preferences.only(of_pairs > 0) if weight.selects else preferences


class WeightedFitting(NamedTuple):
    """A dataset with weights, and how many pairs were too long for it."""

    dataset: Dataset
    too_long: int
    mean_weight: float
    max_weight: float

    @property
    def results(self) -> dict[str, Any]:
        """The figures for run.json."""
        weight = {"mean_weight": self.mean_weight, "max_weight": self.max_weight}
        return Fitting(self.dataset, self.too_long).results | weight


def tokenised(preferences: Preferences, formatter: Formatter, max_length: int) -> WeightedFitting:
    """The columns prompt_ids, chosen_ids, rejected_ids and weight.

    Pairs with a text over max_length tokens are left out rather than cut.
    Raises: DatasetError when none is left.
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

    dataset, too_long = fitting(pairs_and_weights, rows, max_length)
    used = np.asarray(dataset.with_format("numpy")[_WEIGHT_COLUMN][:])
    return WeightedFitting(dataset, too_long, float(used.mean()), float(used.max()))


def _row(chosen: TokenisedText, rejected: TokenisedText) -> dict[str, list[int]]:
    # Where tokens merge across the seam, both responses start at the earlier place.
    shared = min(len(chosen.prompt_ids), len(rejected.prompt_ids))
    return {
        "prompt_ids": chosen.prompt_ids[:shared],
        "chosen_ids": chosen.prompt_ids[shared:] + chosen.response_ids,
        "rejected_ids": rejected.prompt_ids[shared:] + rejected.response_ids,
    }


def _objective(loss: str, labels: Labels, weight: str, *, by_prompt: bool) -> str:
    if labels == "human":
        return f"{loss}, human labels"
    return f"{loss}, weight {weight}{' / prompt_pairs' if by_prompt else ''}"


def loss_arguments(pair_loss: PairLoss) -> dict[str, Any]:
    """Arguments of ConfidenceDPOConfig: the loss and its constants, and what it is weighted by."""
    loss, cache = LOSSES[pair_loss.loss], pair_loss.reference_cache
    constants = {each.config_field: getattr(pair_loss, each.flag) for each in loss.constants}
    return {
        "loss_type": [loss.trl_type],
        "precompute_ref_log_probs": pair_loss.precomputes_reference,
        "reference_cache": str(cache) if cache is not None else None,
        "weight_column": _WEIGHT_COLUMN,
        **constants,
    }
