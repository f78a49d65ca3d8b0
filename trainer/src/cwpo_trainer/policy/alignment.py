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
from cwpo_trainer.cards.policy_card import write_policy_cards
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import (
    Preferences,
    annotator_results,
    read_human,
    read_weighted,
    read_with_evaluation,
    report_unused,
    weights_of,
)
from cwpo_trainer.losses import EPSILON, LOSSES
from cwpo_trainer.plan.dry_run import Plan, ReferenceUse
from cwpo_trainer.policy import preflight
from cwpo_trainer.policy.adapters import going_on, new_adapter
from cwpo_trainer.policy.arguments import evaluation_arguments, training_arguments
from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.policy.dataset import Fitting, fitting, named
from cwpo_trainer.policy.end_of_turn import end_turns
from cwpo_trainer.policy.formatting import Formatter, TokenisedText
from cwpo_trainer.policy.loading import load_for_training, load_reference, load_tokenizer
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
from cwpo_trainer.soft_labels import SOFT_LABELS, SoftLabel, epsilons
from cwpo_trainer.weights import WEIGHTS

_WEIGHT_COLUMN, _EPSILON_COLUMN = "weight", "epsilon"
# Of adapters: TRL switches that of all layers off, since policy and reference are compared.
_DROPOUT = 0.0


def align(settings: Alignment) -> None:
    """Align the model and write its folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    preflight.check_loss(settings)
    preflight.check_reference(settings, settings)
    preflight.check_weighting(settings, settings.labels)
    preflight.check(settings)
    preferences, evaluation = read_with_evaluation(
        partial(
            _preferences,
            labels=settings.labels,
            weighting=settings,
            soft_label=SOFT_LABELS.get(settings.confidence_as),
            max_rejected_share=settings.max_rejected_share,
        ),
        settings.data,
        eval_data=settings.eval_data,
        eval_fraction=settings.eval_fraction,
        seed=settings.seed,
    )
    # Only now, so that the pairs held out are those that SFT holds out.
    if WEIGHTS[settings.weight].selects:
        preferences = preferences.selected()
        evaluation = evaluation and evaluation.selected()
    process.prepare(seed=settings.seed, threads=settings.threads)
    start = resolve(settings.model, weights=not settings.dry_run)
    settings = going_on(settings, start)
    by_prompt = preferences.has_prompt_pairs and settings.weight_by == "prompt"
    objective = _objective(settings, by_prompt=by_prompt)
    if settings.dry_run:
        preferences.unused.tell(are_listed=False)
        tokenizer = load_tokenizer(start)
        pairs = tokenised(preferences, Formatter(tokenizer), settings.max_length)
        plan(settings, pairs, objective, reference_use(settings, lora=settings.lora)).show()
        return
    # Without effect, where a run of a version without these settings can be resumed.
    unused = set() if preferences.has_prompt_pairs else {"weight_by"}
    if settings.confidence_as == "weight":
        unused |= {"confidence_as"}
    recorded = settings.model_dump(mode="json", exclude=unused)
    with new_run_folder("align", settings.output, recorded, resume=settings.resume) as output:
        report_unused(output, preferences, evaluation)
        output.results |= annotator_results(settings.data, settings.labels)
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
            **loss_arguments(settings, soft_labels=preferences.epsilons is not None),
            share_prompts=settings.share_prompts,
            report_to=settings.report_to,
        )
        policy, reference = _models(settings)
        output.results |= end_turns(policy, tokenizer)
        trainer = ConfidenceDPOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=pairs.dataset,
            eval_dataset=evaluated.dataset if evaluated is not None else None,
            processing_class=tokenizer,
            peft_config=new_adapter(policy, settings, dropout=_DROPOUT),
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
        write_policy_cards(output)
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


def _models(settings: Alignment) -> tuple[Any, Any | None]:
    """The policy, and the reference if it is a second model."""
    bfloat16 = process.use_bfloat16(settings.dtype)
    loaded = partial(
        load_for_training,
        is_frozen=settings.lora,
        bfloat16=bfloat16,
        in_4bit=settings.load_in_4bit,
    )
    policy = loaded(settings.model, adapter_dropout=_DROPOUT)
    use = reference_use(settings, lora=settings.lora)
    if use is None or not use.is_second_model:
        return policy, None
    named = settings.reference or settings.model
    if settings.lora:
        return policy, loaded(named)
    is_sharded = settings.sharding != "none"
    return policy, load_reference(named, bfloat16=bfloat16, is_sharded=is_sharded)


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


def _preferences(
    path: Path,
    *,
    labels: Labels,
    weighting: Weighting,
    soft_label: SoftLabel | None,
    max_rejected_share: float,
) -> Preferences:
    """The pairs of a file with their weights, and their epsilons if labels are soft."""
    unused = UnusedRows(max_rejected_share)
    if labels == "human":
        pairs = read_human(path, unused)
        return Preferences(pairs, weights.none(len(pairs)), unused)
    pairs = read_weighted(path, unused, calibrated=weighting.calibrated)
    weight = WEIGHTS[weighting.weight]
    constants = {each.argument: getattr(weighting, each.flag) for each in weight.constants}
    of_pairs = weights_of(
        pairs,
        weighting.weight,
        normalise=weighting.normalise,
        by_prompt=weighting.weight_by == "prompt",
        **constants,
    )
    if soft_label is None:
        return Preferences(pairs, of_pairs, unused)
    confidences = [pair.confidence for pair in pairs]
    return Preferences(pairs, of_pairs, unused, epsilons(confidences, most=soft_label.most))


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
    """The columns prompt_ids, chosen_ids, rejected_ids and weight; and epsilon of soft labels.

    Pairs with a text over max_length tokens are left out rather than cut.
    Raises: DatasetError when none is left.
    """
    numbers = {_WEIGHT_COLUMN: preferences.weights.tolist()}
    if preferences.epsilons is not None:
        numbers[_EPSILON_COLUMN] = preferences.epsilons.tolist()

    def rows(places: Sequence[int]) -> list[dict[str, Any]]:
        some = [preferences.pairs[at] for at in places]
        prompts = [pair.prompt for pair in some]
        chosen = formatter.tokenise(prompts, [pair.chosen for pair in some])
        rejected = formatter.tokenise(prompts, [pair.rejected for pair in some])
        return [
            _row(of_chosen, of_rejected) | {name: of_all[at] for name, of_all in numbers.items()}
            for of_chosen, of_rejected, at in zip(chosen, rejected, places, strict=True)
            if max(of_chosen.tokens, of_rejected.tokens) <= max_length
        ]

    dataset, too_long = fitting(range(len(preferences.pairs)), rows, max_length)
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


def _objective(settings: Alignment, *, by_prompt: bool) -> str:
    if settings.labels == "human":
        return f"{settings.loss}, human labels"
    use = f"weight {settings.weight}"
    if settings.confidence_as != "weight":
        use = f"confidence as {settings.confidence_as}"
    return f"{settings.loss}, {use}{' / prompt_pairs' if by_prompt else ''}"


def loss_arguments(pair_loss: PairLoss, *, soft_labels: bool = False) -> dict[str, Any]:
    """Arguments of ConfidenceDPOConfig: the loss and its constants, and what it is weighted by.

    Args:
        soft_labels: the dataset has an epsilon for each pair.
    """
    loss, cache = LOSSES[pair_loss.loss], pair_loss.reference_cache
    constants = {each.config_field: getattr(pair_loss, each.flag) for each in loss.constants}
    if soft_labels:
        del constants[EPSILON.config_field]
        constants["epsilon_column"] = _EPSILON_COLUMN
    return {
        "loss_type": [loss.trl_type],
        "precompute_ref_log_probs": pair_loss.precomputes_reference,
        "reference_cache": str(cache) if cache is not None else None,
        "weight_column": _WEIGHT_COLUMN,
        **constants,
    }
