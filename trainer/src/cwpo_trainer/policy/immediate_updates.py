"""Online CW-DPO with immediate updates (App. J.5): each step trains on answers sampled for it.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.online`, with the flags of `cwpo online`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue

from cwpo.client import Client
from cwpo.errors import ConfigError, DatasetError
from cwpo.types import ModelInfo, Prompt
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer.cards.policy_card import write_policy_cards
from cwpo_trainer.data.prompts import read_prompts
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.hub import push
from cwpo_trainer.policy.adapters import going_on, new_adapter
from cwpo_trainer.policy.alignment import (
    DROPOUT,
    WeightedFitting,
    all_pairs,
    check,
    loads_once,
    loss_arguments,
    objective_of,
    policy_and_reference,
    weighted_fitting,
)
from cwpo_trainer.policy.arguments import evaluation_arguments, training_arguments
from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOConfig
from cwpo_trainer.policy.dataset import named
from cwpo_trainer.policy.end_of_turn import end_turns
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.policy.loading import load_tokenizer
from cwpo_trainer.policy.online_dpo import OnlineDPOTrainer
from cwpo_trainer.policy.online_pairs import OnlinePairs
from cwpo_trainer.policy.online_record import OnlineRecord
from cwpo_trainer.policy.saving import save
from cwpo_trainer.policy.set_arguments import with_set
from cwpo_trainer.policy.trl_training import train
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import PAIRS_NAME, RunFolder, check_output, new_run_folder
from cwpo_trainer.settings.online_alignment import OnlineAlignment
from cwpo_trainer.settings.policy_training import Alignment
from cwpo_trainer.soft_labels import SOFT_LABELS
from cwpo_trainer.weights import WEIGHTS

# Settings of answering that a resumed run needs as before; those of alignment have other names.
_OF_ANSWERS = ("update", "responses", "max_new_tokens", "temperature", "top_p", "truncation")


def online(settings: OnlineAlignment, alignment: Alignment, client: Client) -> None:
    """Train the policy on its own answers, step by step, and write its folder.

    Args:
        alignment: its model, data and output are those of the settings.
        client: of the service that annotates; closed in the end.
    Raises: CwpoError, before any model is loaded, for settings, prompts or a service that will not
        do; later where the service fails, and then --resume goes on from the last checkpoint.
    """
    more = _check(settings, alignment)
    check_output(alignment.output, resume=alignment.resume)
    process.prepare(seed=alignment.seed, threads=settings.threads or alignment.threads)
    start = resolve(alignment.model, weights=False)
    alignment = going_on(alignment, start)
    tokenizer = load_tokenizer(start)
    unused = UnusedRows(settings.max_rejected_share)
    room = alignment.max_length - settings.max_new_tokens
    prompts, too_long = _fitting(read_prompts(settings.prompts, unused), tokenizer, room)
    evaluated: WeightedFitting | None = None
    if alignment.eval_data is not None:
        part = all_pairs(alignment.eval_data, alignment, tokenizer)
        evaluated = weighted_fitting(part, alignment.max_length)
    with client:
        annotator = client.model()
        _check_annotator(alignment, annotator)
        resolve(alignment.model)
        recorded = _recorded(settings, alignment, annotator) | {"set": more}
        with new_run_folder(
            "online", alignment.output, recorded, resume=alignment.resume
        ) as output:
            unused.report(output)
            output.results |= {
                "annotator": annotator.ref().model_dump(),
                "prompts": len(prompts),
                "prompts_too_long": too_long,
            }
            if evaluated is not None:
                output.results |= named(evaluated.results, "eval")
            record = _record(settings, annotator, output)
            once = loads_once(alignment)
            config = _config(settings, alignment, output, len(prompts), more, loads_once=once)
            policy, reference = policy_and_reference(
                alignment, weights=process.is_main() or not once
            )
            output.results |= end_turns(policy, tokenizer)
            trainer = OnlineDPOTrainer(
                model=policy,
                ref_model=reference,
                args=config,
                eval_dataset=evaluated.dataset if evaluated is not None else None,
                processing_class=tokenizer,
                peft_config=new_adapter(policy, alignment, dropout=DROPOUT),
                prompts=len(prompts),
                pairs=OnlinePairs(prompts, settings, alignment, client, annotator.revision),
                record=record,
            )
            train(trainer, output, alignment, f"online {objective_of(alignment)}")
            if record is not None:
                output.results |= {"pairs": record.pairs, "drift": record.drift}
            output.results |= save(
                trainer,
                output.path,
                adapts=alignment.model if alignment.lora else None,
                adapter_only=alignment.adapter_only,
            )
            write_policy_cards(output)
    push(alignment.output, alignment.push_to_hub)


def _check(settings: OnlineAlignment, one: Alignment) -> dict[str, JsonValue]:
    """All checks of settings; the arguments that `set` of the file gives.

    Raises: ConfigError for settings of the file of --align that pairs made on the way cannot have,
        and as `check` of an alignment does.
    """
    weight = WEIGHTS[one.weight]
    all_at_once = "its pairs are not known before the step that they are made in"
    of_weight = all_at_once if weight.compares else None
    if weight.reads_certified:
        of_weight = "a certificate is of labels like those that it was measured on, not of answers"
    reasons = {
        "labels: human": "the annotator labels the answers" if one.labels == "human" else None,
        "annotator": "it is that of --url" if one.annotator is not None else None,
        "reference": "it is MODEL" if one.reference is not None else None,
        "dry_run": "how long answers are is not known" if one.dry_run else None,
        "precompute_reference": all_at_once if one.precompute_reference else None,
        "reference_cache": all_at_once if one.reference_cache is not None else None,
        "eval_fraction": f"{all_at_once}; use eval_data" if one.eval_fraction else None,
        "normalise": all_at_once if one.normalise else None,
        f"weight: {one.weight}": of_weight,
        "sharding: zero3": "answers are sampled by FSDP2 alone; use sharding: fsdp2"
        if one.sharding == "zero3"
        else None,
    }
    for name, reason in reasons.items():
        if reason is not None:
            raise ConfigError(
                f"--align {settings.align}: {name} is not for --update immediate: {reason}"
            )
    return check(one)


def _fitting(prompts: Sequence[Prompt], tokenizer: Any, room: int) -> tuple[list[Prompt], int]:
    """The prompts of at most `room` tokens, and the number of the others, which is said on stderr.

    Raises: DatasetError for none.
    """
    openings = Formatter(tokenizer).opening_ids(prompts)
    fitting = [each for each, ids in zip(prompts, openings, strict=True) if len(ids) <= room]
    too_long = len(prompts) - len(fitting)
    if not fitting:
        raise DatasetError(
            f"all {too_long:,} prompts are longer than the {room:,} tokens that max_length of "
            "--align leaves beside --max-new-tokens"
        )
    if too_long and process.is_main():
        print(
            f"{too_long:,} of {len(prompts):,} prompts left out: longer than the {room:,} tokens "
            "that max_length of --align leaves beside --max-new-tokens",
            file=sys.stderr,
        )
    return fitting, too_long


def _check_annotator(alignment: Alignment, annotator: ModelInfo) -> None:
    if alignment.calibrated and annotator.temperature is None:
        raise ConfigError(
            f"calibrated: the annotator {annotator.name} has no calibration temperature"
        )


def _recorded(
    settings: OnlineAlignment, alignment: Alignment, annotator: ModelInfo
) -> dict[str, JsonValue]:
    """The settings for run.json."""
    of_answers = settings.model_dump(mode="json", include={*_OF_ANSWERS})
    return {
        **alignment.model_dump(mode="json"),
        **of_answers,
        "answers_at_once": settings.batch_size,
        "answers_seed": settings.seed,
        "annotator": annotator.revision,
    }


def _record(
    settings: OnlineAlignment, annotator: ModelInfo, output: RunFolder
) -> OnlineRecord | None:
    """Of the first process."""
    if not process.is_main():
        return None
    return OnlineRecord(
        output.path / PAIRS_NAME,
        annotator.confidence_quantiles,
        window=settings.drift_window,
        limit=settings.drift_limit,
    )


def _config(
    settings: OnlineAlignment,
    alignment: Alignment,
    output: RunFolder,
    prompts: int,
    more: dict[str, JsonValue],
    *,
    loads_once: bool,
) -> Any:
    """The trainer's arguments, for so many prompts."""
    ours = dict(
        **training_arguments(alignment, output.path, prompts, loads_once=loads_once),
        **evaluation_arguments(alignment),
        **loss_arguments(alignment, soft_labels=alignment.confidence_as in SOFT_LABELS),
        share_prompts=alignment.share_prompts,
        report_to=alignment.report_to,
        data_seed=settings.seed,
    )
    return with_set(ConfidenceDPOConfig, ours, more)
