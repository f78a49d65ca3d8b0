"""Step (iii), first half: supervised fine-tuning of the strong model on the chosen responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from cwpo_annotator.checkpoint import resolve
from cwpo_trainer import launch, policy, preflight, runtime
from cwpo_trainer.formatting import Formatter
from cwpo_trainer.plan import Plan
from cwpo_trainer.record import Output, new_output
from cwpo_trainer.weighted import WeightedPair, evaluation_rows, read_human, read_weighted

if TYPE_CHECKING:
    from cwpo_trainer.commands import Sft


def run(settings: Sft) -> None:
    """Fine-tune and write the model folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    preflight.check(settings)
    pairs, evaluation = read(settings)
    runtime.prepare(seed=settings.seed, threads=settings.threads)
    if settings.dry_run:
        _plan(settings, pairs)
        return
    folder = resolve(settings.model)
    recorded = settings.model_dump(mode="json")
    with new_output("sft", settings.output, recorded, resume=settings.resume) as output:
        tokenizer = policy.load_tokenizer(folder)
        formatter = Formatter(tokenizer)
        dataset = tokenised(pairs, formatter, settings.max_length, output)
        # Made first: under ZeRO-3 it decides how models are loaded.
        config = SFTConfig(**policy.training_arguments(settings, output.folder, len(dataset)))
        trainer = SFTTrainer(
            model=policy.load_for_training(settings),
            args=config,
            train_dataset=dataset,
            eval_dataset=tokenised(evaluation, formatter, settings.max_length, output, "eval_")
            if evaluation
            else None,
            processing_class=tokenizer,
            peft_config=policy.lora_config(settings),
        )
        policy.train(trainer, settings, output, "SFT")
        policy.save(trainer, settings, output.folder)
    policy.push(settings)


def _plan(settings: Sft, pairs: list[WeightedPair]) -> None:
    folder = resolve(settings.model, weights=False)
    output = Output("sft", {}, settings.output)
    formatter = Formatter(policy.load_tokenizer(folder))
    dataset = tokenised(pairs, formatter, settings.max_length, output)
    lengths = np.array([[len(ids)] for ids in dataset["input_ids"]], dtype=np.int64)
    used, too_long = output.results["pairs"], output.results["pairs_too_long"]
    scored = np.array([[sum(at >= 0 for at in row)] for row in dataset["labels"]], dtype=np.int64)
    Plan(settings, folder, lengths, scored, with_reference=False, reads_reference="never").show(
        [("responses", f"{used:,} chosen ones, {too_long:,} too long")]
    )


def read(settings: Sft) -> tuple[list[WeightedPair], list[WeightedPair]]:
    """The pairs to train and to evaluate on. Raises: DatasetError."""
    of = read_human if settings.labels == "human" else read_weighted
    pairs = of(settings.data)
    if settings.eval_data is not None:
        return pairs, of(settings.eval_data)
    if not settings.eval_fraction:
        return pairs, []
    kept = evaluation_rows(pairs, settings.eval_fraction, seed=settings.seed)
    rows = list(zip(pairs, kept, strict=True))
    return [pair for pair, is_kept in rows if not is_kept], [
        pair for pair, is_kept in rows if is_kept
    ]


def tokenised(
    pairs: list[WeightedPair],
    formatter: Formatter,
    max_length: int,
    output: Output,
    part: str = "",
) -> Dataset:
    """The columns input_ids and labels; the prompt carries no loss.

    Texts over max_length tokens are left out rather than cut, and counted in the results.
    Raises: DatasetError when none is left.
    """

    def rows(part: Sequence[WeightedPair]) -> list[dict[str, Any]]:
        texts = formatter.tokenise([pair.prompt for pair in part], [pair.chosen for pair in part])
        return [
            {
                "input_ids": text.prompt_ids + text.response_ids,
                "labels": [-100] * len(text.prompt_ids) + text.response_ids,
            }
            for text in texts
            if text.tokens <= max_length
        ]

    return policy.dataset_of(pairs, rows, max_length, output, part)


if __name__ == "__main__":
    from cwpo_trainer.commands import Sft

    launch.main(Sft, "python -m cwpo_trainer.sft")
