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
from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from cwpo.errors import DatasetError
from cwpo_annotator.checkpoint import base_folder, resolve
from cwpo_annotator.encoding.prefix import common_prefix
from cwpo_trainer import weights
from cwpo_trainer.cards.policy_card import write_policy_cards
from cwpo_trainer.data.weighted import (
    PairFile,
    WeightedPair,
    annotator_results,
    read_certificate,
    weights_of,
)
from cwpo_trainer.hub import push
from cwpo_trainer.losses import EPSILON, LOSSES
from cwpo_trainer.plan.dry_run import Plan, ReferenceUse, Texts, policy_plan
from cwpo_trainer.policy import preflight
from cwpo_trainer.policy.adapters import going_on, new_adapter
from cwpo_trainer.policy.arguments import evaluation_arguments, training_arguments
from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.policy.dataset import (
    Fitting,
    Form,
    Part,
    TokenFile,
    in_python,
    named,
    parts,
    report_unused,
    token_file,
)
from cwpo_trainer.policy.end_of_turn import end_turns
from cwpo_trainer.policy.formatting import Formatter, TokenisedText
from cwpo_trainer.policy.loading import (
    can_load_once,
    load_for_training,
    load_reference,
    load_tokenizer,
)
from cwpo_trainer.policy.saving import save
from cwpo_trainer.policy.set_arguments import set_arguments, with_set
from cwpo_trainer.policy.trl_training import train
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import check_output, new_run_folder
from cwpo_trainer.settings.policy_training import (
    Alignment,
    PairLoss,
    PolicyTraining,
)
from cwpo_trainer.settings.unused_flags import flag
from cwpo_trainer.soft_labels import SOFT_LABELS, epsilons
from cwpo_trainer.weights import WEIGHTS

WEIGHT_COLUMN, EPSILON_COLUMN = "weight", "epsilon"
"""Of the datasets that are trained on: the numbers of each pair."""

# Of adapters: TRL switches that of all layers off, since policy and reference are compared.
DROPOUT = 0.0


def align(settings: Alignment) -> None:
    """Align the model and write its folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    more = check(settings)
    if not settings.dry_run:
        check_output(settings.output, resume=settings.resume)
    process.prepare(seed=settings.seed, threads=settings.threads)
    start = resolve(settings.model, weights=False)
    settings = with_measured_epsilon(going_on(settings, start))
    tokenizer = load_tokenizer(start)
    training, evaluation = weighted_parts(settings, tokenizer)
    pairs = weighted_fitting(training, settings.max_length)
    has_prompt_pairs = training.file.prompt_pairs is not None
    by_prompt = has_prompt_pairs and settings.weight_by == "prompt"
    objective = objective_of(settings, by_prompt=by_prompt)
    if settings.dry_run:
        training.file.unused.tell(are_listed=False)
        plan(settings, pairs, objective, reference_use(settings, settings)).show()
        return
    # Downloaded only now, for data that can be used.
    resolve(settings.model)
    # Without effect on triplets, where a run of a version without this setting can be resumed.
    unused = set() if has_prompt_pairs else {"weight_by"}
    recorded = settings.model_dump(mode="json", exclude=unused) | {"set": more}
    with new_run_folder("align", settings.output, recorded, resume=settings.resume) as output:
        report_unused(output, training, evaluation)
        output.results |= annotator_results(settings.data, settings.labels)
        output.results |= pairs.results
        if has_prompt_pairs:
            output.results["weight_by"] = settings.weight_by
        evaluated = None
        if evaluation is not None:
            evaluated = weighted_fitting(evaluation, settings.max_length)
            output.results |= named(evaluated.results, "eval")
        # Made first: under ZeRO-3 it decides how models are loaded.
        once = loads_once(settings)
        ours = dict(
            **training_arguments(settings, output.path, len(pairs.dataset), loads_once=once),
            **evaluation_arguments(settings),
            **loss_arguments(settings, soft_labels=settings.confidence_as in SOFT_LABELS),
            share_prompts=settings.share_prompts,
            report_to=settings.report_to,
        )
        config = with_set(ConfidenceDPOConfig, ours, more)
        policy, reference = policy_and_reference(settings, weights=process.is_main() or not once)
        output.results |= end_turns(policy, tokenizer)
        trainer = ConfidenceDPOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=pairs.dataset,
            eval_dataset=evaluated.dataset if evaluated is not None else None,
            processing_class=tokenizer,
            peft_config=new_adapter(policy, settings, dropout=DROPOUT),
        )
        if config.precompute_ref_log_probs:
            # It has read all pairs.
            reference = trainer.ref_model = None
        for name, pairs_found in trainer.pairs_from_cache.items():
            found = {"pairs_from_reference_cache": pairs_found}
            output.results |= found if name == "train" else named(found, name)
        train(trainer, output, settings, objective)
        output.results |= save(
            trainer,
            output.path,
            adapts=settings.model if settings.lora else None,
            adapter_only=settings.adapter_only,
        )
        write_policy_cards(output)
    push(settings.output, settings.push_to_hub)


def check(settings: Alignment) -> dict[str, JsonValue]:
    """All checks of settings, before any data is read; the arguments that --set gives.

    Raises: ConfigError, CheckpointError or DatasetError for the first setting that cannot be had.
    """
    preflight.check_loss(settings)
    preflight.check_reference(settings, settings)
    preflight.check_weighting(settings, settings.labels)
    preflight.check(settings)
    return set_arguments(settings, ConfidenceDPOConfig)


def with_measured_epsilon(settings: Alignment) -> Alignment:
    """The settings, in which --epsilon auto is the share of errors that the certificate measured.

    Raises: DatasetError for data without a certificate.
    """
    if not settings.measures_epsilon:
        return settings
    certificate = read_certificate(settings.data)
    if certificate is None:
        raise DatasetError(
            f"--epsilon auto: {settings.data} does not say how many certified labels are wrong; "
            "Parquet from `cwpo annotate --max-error` does"
        )
    return settings.model_copy(update={EPSILON.flag: certificate.errors / certificate.pairs})


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
    lengths = [
        (*map(len, ids), common_prefix(*ids[1:]))
        for ids in in_python(pairs.dataset, "prompt_ids", "chosen_ids", "rejected_ids")
    ]
    prompt, chosen, rejected, begin_alike = np.array(lengths, dtype=np.int64).T
    return policy_plan(
        training,
        base_folder(resolve(training.model, weights=False), weights=False),
        Texts(
            np.stack([prompt + chosen, prompt + rejected], axis=1),
            np.stack([chosen, rejected], axis=1),
            prompt + begin_alike,
        ),
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


def loads_once(settings: Alignment) -> bool:
    """Whether the first process alone loads policy and reference, and hands them to the others."""
    models = {settings.model, settings.reference or settings.model}
    return settings.sharding == "fsdp2" and all(map(can_load_once, models))


def policy_and_reference(settings: Alignment, *, weights: bool = True) -> tuple[Any, Any | None]:
    """The policy, and the reference if it is a second model.

    Args:
        weights: load them; otherwise another process does.
    """
    bfloat16 = process.use_bfloat16(settings.dtype)
    loaded = partial(
        load_for_training,
        is_frozen=settings.lora,
        bfloat16=bfloat16,
        in_4bit=settings.load_in_4bit,
        attention=settings.attn_implementation,
        weights=weights,
    )
    policy = loaded(settings.model, adapter_dropout=DROPOUT)
    use = reference_use(settings, settings)
    if use is None or not use.is_second_model:
        return policy, None
    named = settings.reference or settings.model
    if settings.lora:
        return policy, loaded(named)
    return policy, load_reference(
        named,
        bfloat16=bfloat16,
        is_sharded=settings.sharding != "none",
        attention=settings.attn_implementation,
        weights=weights,
    )


def reference_use(loss: PairLoss, training: PolicyTraining) -> ReferenceUse | None:
    """How the reference is read while training; None for a loss that has none.

    Where the reference is the start model, it is under LoRA the policy itself with its adapter
    switched off, and log-probabilities that are precomputed come from it before its first step. But
    FSDP2 shards a policy only as training begins: what reads the pairs before is a second model.
    """
    if not loss.reads_reference:
        return None
    is_read_first = loss.precomputes_reference and training.sharding != "fsdp2"
    is_policy = loss.reference is None and (training.lora or is_read_first)
    return ReferenceUse(
        is_second_model=not is_policy,
        is_precomputed=loss.precomputes_reference,
        cache=loss.reference_cache,
    )


def weighted_parts(
    settings: Alignment, tokenizer: PreTrainedTokenizerBase
) -> tuple[Part, Part | None]:
    """The pairs to train on, and those to evaluate on, with the column weight.

    Soft labels have the column epsilon, too. Raises: DatasetError.
    """
    read = partial(_weighted_file, settings=settings, tokenizer=tokenizer)
    training, evaluation = parts(read, settings.data, settings, seed=settings.seed)
    # Only now, so that the pairs held out are those that SFT holds out.
    if WEIGHTS[settings.weight].selects:
        training = _selected(training, settings.weight)
        evaluation = evaluation and _selected(evaluation, settings.weight)
    return training, evaluation


def all_pairs(path: Path, settings: Alignment, tokenizer: PreTrainedTokenizerBase) -> Part:
    """All pairs of a file, with the columns of `weighted_parts`. Raises: DatasetError."""
    file = _weighted_file(path, settings=settings, tokenizer=tokenizer)
    return Part(file, np.ones(len(file), dtype=np.bool_))


def _weighted_file(
    path: Path, *, settings: Alignment, tokenizer: PreTrainedTokenizerBase
) -> TokenFile:
    source = PairFile(path, settings.labels, settings.calibrated)
    file = token_file(source, PAIRS, tokenizer, max_rejected_share=settings.max_rejected_share)
    if settings.labels == "human":
        return file.with_numbers(**{WEIGHT_COLUMN: weights.none(len(file))})
    weight = WEIGHTS[settings.weight]
    of_pairs = weights_of(
        file.confidences,
        settings.weight,
        normalise=settings.normalise,
        prompt_pairs=file.prompt_pairs if settings.weight_by == "prompt" else None,
        certified=file.certified,
        **{each.argument: getattr(settings, each.flag) for each in weight.constants},
    )
    weighted = file.with_numbers(**{WEIGHT_COLUMN: of_pairs})
    soft = SOFT_LABELS.get(settings.confidence_as)
    if soft is None:
        return weighted
    of_pairs = epsilons(file.confidences, most=soft.most)
    return weighted.with_numbers(**{EPSILON_COLUMN: of_pairs})


def _selected(part: Part, weight: str) -> Part:
    """The pairs of a weight above 0. Raises: DatasetError for none."""
    total = int(part.rows.sum())
    part = part.only(part.file.numbers(WEIGHT_COLUMN) > 0)
    if not part.rows.any():
        larger = "".join(f"raise {flag(each.flag)}, or " for each in WEIGHTS[weight].constants)
        raise DatasetError(f"none of {total:,} pairs is selected: {larger}give more to --eval-data")
    return part


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


def weighted_fitting(part: Part, max_length: int) -> WeightedFitting:
    """The pairs of which no text is longer; the others are left out rather than cut.

    Raises: DatasetError when none is left.
    """
    dataset, too_long = part.fitting(max_length)
    used = np.asarray(dataset.with_format("numpy")[WEIGHT_COLUMN][:])
    return WeightedFitting(dataset, too_long, float(used.mean()), float(used.max()))


def _pair_rows(formatter: Formatter, pairs: Sequence[WeightedPair]) -> list[dict[str, Any]]:
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    texts = formatter.tokenise(
        prompts, [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    )
    return [_row(*both) for both in zip(texts[::2], texts[1::2], strict=True)]


def _row(chosen: TokenisedText, rejected: TokenisedText) -> dict[str, Any]:
    # Where tokens merge across the seam, both responses start at the earlier place.
    shared = min(len(chosen.prompt_ids), len(rejected.prompt_ids))
    return {
        "prompt_ids": chosen.prompt_ids[:shared],
        "chosen_ids": chosen.prompt_ids[shared:] + chosen.response_ids,
        "rejected_ids": rejected.prompt_ids[shared:] + rejected.response_ids,
        "tokens": max(chosen.tokens, rejected.tokens),
    }


PAIRS = Form("pairs", ("prompt_ids", "chosen_ids", "rejected_ids"), _pair_rows)
"""What DPOTrainer reads."""


def objective_of(settings: Alignment, *, by_prompt: bool = False) -> str:
    """Loss and weight, for the user.

    Args:
        by_prompt: whether the weights of a prompt's pairs are divided by their number.
    """
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
        constants["epsilon_column"] = EPSILON_COLUMN
    return {
        "loss_type": [loss.trl_type],
        "precompute_ref_log_probs": pair_loss.precomputes_reference,
        "reference_cache": str(cache) if cache is not None else None,
        "weight_column": WEIGHT_COLUMN,
        **constants,
    }
