"""Step (iii), first half: supervised fine-tuning of the strong model on the chosen responses.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.sft`, with the flags of `cwpo sft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig

from cwpo_annotator.checkpoint import base_folder, resolve
from cwpo_trainer.cards.policy_card import write_policy_cards
from cwpo_trainer.data.weighted import PairFile, WeightedPair, annotator_results
from cwpo_trainer.hub import push
from cwpo_trainer.lora import adding_adapters
from cwpo_trainer.plan.dry_run import Plan, Texts, policy_plan
from cwpo_trainer.policy import preflight
from cwpo_trainer.policy.adapters import going_on, new_adapter
from cwpo_trainer.policy.arguments import evaluation_arguments, training_arguments
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
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.policy.loading import can_load_once, load_for_training, load_tokenizer
from cwpo_trainer.policy.packed_sft import PackedSFTTrainer
from cwpo_trainer.policy.saving import save
from cwpo_trainer.policy.set_arguments import set_arguments, with_set
from cwpo_trainer.policy.trl_training import train
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import check_output, new_run_folder
from cwpo_trainer.settings.policy_training import FineTuning, PolicyTraining


def fine_tune(settings: FineTuning) -> None:
    """Fine-tune the model and write its folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    preflight.check(settings)
    more = set_arguments(settings, SFTConfig)
    if not settings.dry_run:
        check_output(settings.output, resume=settings.resume)
    process.prepare(seed=settings.seed, threads=settings.threads)
    start = resolve(settings.model, weights=False)
    settings = going_on(settings, start)
    tokenizer = load_tokenizer(start)
    training, evaluation = response_parts(settings, tokenizer)
    responses = training.fitting(settings.max_length)
    if settings.dry_run:
        training.file.unused.tell(are_listed=False)
        plan(settings, responses).show()
        return
    # Downloaded only now, for data that can be used.
    resolve(settings.model)
    recorded = settings.model_dump(mode="json") | {"set": more}
    with new_run_folder("sft", settings.output, recorded, resume=settings.resume) as output:
        report_unused(output, training, evaluation)
        output.results |= annotator_results(settings.data, settings.labels)
        output.results |= responses.results
        evaluated = None
        if evaluation is not None:
            evaluated = evaluation.fitting(settings.max_length)
            output.results |= named(evaluated.results, "eval")
        # Made first: under ZeRO-3 it decides how models are loaded.
        once = settings.sharding == "fsdp2" and can_load_once(settings.model)
        ours = dict(
            **training_arguments(settings, output.path, len(responses.dataset), loads_once=once),
            **evaluation_arguments(settings),
            report_to=settings.report_to,
        )
        config = with_set(SFTConfig, ours, more)
        process.use_one_gpu(config)
        policy = load_for_training(
            settings.model,
            is_frozen=settings.lora,
            bfloat16=process.use_bfloat16(settings.dtype),
            in_4bit=settings.load_in_4bit,
            adapter_dropout=settings.lora_dropout,
            attention=settings.attn_implementation,
            weights=process.is_main() or not once,
        )
        output.results |= end_turns(policy, tokenizer)
        with adding_adapters(settings.lora_dropout):
            trainer = PackedSFTTrainer(
                share_prompts=settings.share_prompts,
                model=policy,
                args=config,
                train_dataset=responses.dataset,
                eval_dataset=evaluated.dataset if evaluated is not None else None,
                processing_class=tokenizer,
                peft_config=new_adapter(policy, settings, dropout=settings.lora_dropout),
            )
        train(trainer, output, settings, "SFT")
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
    sizes = [(len(ids), sum(at >= 0 for at in labels)) for ids, labels in in_python(dataset, *_IDS)]
    lengths, scored = np.array(sizes, dtype=np.int64).T[:, :, None]
    facts = [("responses", f"{len(dataset):,} chosen ones, {too_long:,} too long")]
    shared = np.zeros(len(lengths), dtype=np.int64)
    folder = base_folder(resolve(training.model, weights=False), weights=False)
    return policy_plan(training, folder, Texts(lengths, scored, shared), facts=facts)


def response_parts(
    settings: FineTuning, tokenizer: PreTrainedTokenizerBase
) -> tuple[Part, Part | None]:
    """The chosen responses to train on, and those to evaluate on. Raises: DatasetError."""

    def read(path: Path) -> TokenFile:
        source, share = PairFile(path, settings.labels), settings.max_rejected_share
        return token_file(source, RESPONSES, tokenizer, max_rejected_share=share)

    return parts(read, settings.data, settings, seed=settings.seed)


def _response_rows(formatter: Formatter, pairs: Sequence[WeightedPair]) -> list[dict[str, Any]]:
    """The prompt carries no loss."""
    texts = formatter.tokenise([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
    return [
        {
            "input_ids": text.prompt_ids + text.response_ids,
            "labels": [-100] * len(text.prompt_ids) + text.response_ids,
            "tokens": text.tokens,
        }
        for text in texts
    ]


_IDS = ("input_ids", "labels")
RESPONSES = Form("responses", _IDS, _response_rows)
"""What SFTTrainer reads."""
