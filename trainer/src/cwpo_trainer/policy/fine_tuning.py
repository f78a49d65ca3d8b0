"""Step (iii), first half: supervised fine-tuning of the strong model on the chosen responses.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.sft`, with the flags of `cwpo sft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from trl.trainer.sft_config import SFTConfig

from cwpo_annotator.checkpoint import base_folder, resolve
from cwpo_trainer import weights
from cwpo_trainer.cards.policy_card import write_policy_cards
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import (
    Preferences,
    WeightedPair,
    annotator_results,
    read_human,
    read_weighted,
    read_with_evaluation,
    report_unused,
)
from cwpo_trainer.plan.dry_run import Plan
from cwpo_trainer.policy import preflight
from cwpo_trainer.policy.adapters import going_on, new_adapter
from cwpo_trainer.policy.arguments import evaluation_arguments, training_arguments
from cwpo_trainer.policy.dataset import Fitting, fitting, named
from cwpo_trainer.policy.end_of_turn import end_turns
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.policy.loading import load_for_training, load_tokenizer
from cwpo_trainer.policy.packed_sft import PackedSFTTrainer
from cwpo_trainer.policy.saving import push, save
from cwpo_trainer.policy.trl_training import train
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import new_run_folder
from cwpo_trainer.settings.policy_training import FineTuning, Labels, PolicyTraining


def fine_tune(settings: FineTuning) -> None:
    """Fine-tune the model and write its folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    preflight.check(settings)
    preferences, evaluation = read_with_evaluation(
        partial(
            _preferences, labels=settings.labels, max_rejected_share=settings.max_rejected_share
        ),
        settings.data,
        eval_data=settings.eval_data,
        eval_fraction=settings.eval_fraction,
        seed=settings.seed,
    )
    process.prepare(seed=settings.seed, threads=settings.threads)
    start = resolve(settings.model, weights=not settings.dry_run)
    settings = going_on(settings, start)
    if settings.dry_run:
        preferences.unused.tell(are_listed=False)
        tokenizer = load_tokenizer(start)
        responses = tokenised(preferences.pairs, Formatter(tokenizer), settings.max_length)
        plan(settings, responses).show()
        return
    recorded = settings.model_dump(mode="json")
    with new_run_folder("sft", settings.output, recorded, resume=settings.resume) as output:
        report_unused(output, preferences, evaluation)
        output.results |= annotator_results(settings.data, settings.labels)
        tokenizer = load_tokenizer(start)
        formatter = Formatter(tokenizer)
        responses = tokenised(preferences.pairs, formatter, settings.max_length)
        output.results |= responses.results
        evaluated = None
        if evaluation is not None:
            evaluated = tokenised(evaluation.pairs, formatter, settings.max_length)
            output.results |= named(evaluated.results, "eval")
        # Made first: under ZeRO-3 it decides how models are loaded.
        config = SFTConfig(
            **training_arguments(settings, output.path, len(responses.dataset)),
            **evaluation_arguments(settings),
            report_to=settings.report_to,
        )
        process.use_one_gpu(config)
        policy = load_for_training(
            settings.model,
            is_frozen=settings.lora,
            bfloat16=process.use_bfloat16(settings.dtype),
            in_4bit=settings.load_in_4bit,
            adapter_dropout=settings.lora_dropout,
        )
        output.results |= end_turns(policy, tokenizer)
        trainer = PackedSFTTrainer(
            share_prompts=settings.share_prompts,
            model=policy,
            args=config,
            train_dataset=responses.dataset,
            eval_dataset=evaluated.dataset if evaluated is not None else None,
            processing_class=tokenizer,
            peft_config=new_adapter(policy, settings, dropout=settings.lora_dropout),
        )
        train(trainer, output, settings.data, "SFT")
        output.results |= save(
            trainer,
            output.path,
            adapts=settings.model if settings.lora else None,
            adapter_only=settings.adapter_only,
        )
        write_policy_cards(output)
    push(settings.output, settings.push_to_hub)


def plan(training: PolicyTraining, responses: Fitting) -> Plan:
    """What fine-tuning on these chosen responses would do and need."""
    dataset, too_long = responses
    lengths = np.array([[len(ids)] for ids in dataset["input_ids"]], dtype=np.int64)
    scored = np.array([[sum(at >= 0 for at in row)] for row in dataset["labels"]], dtype=np.int64)
    facts = [("responses", f"{len(dataset):,} chosen ones, {too_long:,} too long")]
    shared = np.zeros(len(lengths), dtype=np.int64)
    folder = base_folder(resolve(training.model, weights=False), weights=False)
    return Plan(training, folder, lengths, scored, shared, facts=facts)


def _preferences(path: Path, *, labels: Labels, max_rejected_share: float) -> Preferences:
    """The pairs of a file, which all weigh alike. Raises: DatasetError."""
    unused = UnusedRows(max_rejected_share)
    pairs = (read_human if labels == "human" else read_weighted)(path, unused)
    return Preferences(pairs, weights.none(len(pairs)), unused)


def tokenised(pairs: Sequence[WeightedPair], formatter: Formatter, max_length: int) -> Fitting:
    """The columns input_ids and labels; the prompt carries no loss.

    Texts over max_length tokens are left out rather than cut.
    Raises: DatasetError when none is left.
    """

    def rows(some: Sequence[WeightedPair]) -> list[dict[str, Any]]:
        texts = formatter.tokenise([pair.prompt for pair in some], [pair.chosen for pair in some])
        return [
            {
                "input_ids": text.prompt_ids + text.response_ids,
                "labels": [-100] * len(text.prompt_ids) + text.response_ids,
            }
            for text in texts
            if text.tokens <= max_length
        ]

    return fitting(pairs, rows, max_length)
