"""Step (iii), second half: alignment of the strong model on weighted preferences.

Also runs as `torchrun --nproc-per-node N -m cwpo_trainer.align`, with the flags of `cwpo align`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from cwpo import cli
from cwpo.errors import ConfigError
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer import policy, runtime
from cwpo_trainer.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.formatting import Formatter, TokenisedText
from cwpo_trainer.record import Output, new_output
from cwpo_trainer.weighted import WeightedPair, read_human, read_weighted, weights_of

if TYPE_CHECKING:
    from cwpo_trainer.commands import Align

# TRL's names where they differ from ours.
_LOSS_TYPES = {"dpo": "sigmoid", "rdpo": "robust"}
_WEIGHT_COLUMN = "weight"


def run(settings: Align) -> None:
    """Align and write the model folder; the reference is the start model.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    runtime.expect_world_size(settings.world_size)
    pairs, weights = read(settings)
    folder = resolve(settings.model)
    recorded = settings.model_dump(mode="json")
    with new_output("align", settings.output, recorded, resume=settings.resume) as output:
        runtime.prepare(seed=settings.seed, threads=settings.threads)
        tokenizer = policy.load_tokenizer(folder)
        dataset = tokenised(pairs, weights, Formatter(tokenizer), settings.max_length, output)
        trainer = ConfidenceDPOTrainer(
            model=policy.load_for_training(settings),
            # Under LoRA the reference is the policy itself with its adapter switched off.
            ref_model=None if settings.lora else policy.load_for_training(settings),
            args=_config(settings, output, len(dataset)),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=policy.lora_config(settings),
        )
        policy.train(trainer, settings, output, f"{settings.loss}, weight {settings.weight}")
        policy.save(trainer, settings, output.folder)


def read(settings: Align) -> tuple[list[WeightedPair], NDArray[np.float32]]:
    """The pairs to train on with their weights, shape (pairs,).

    Pairs that `top` leaves out are not read by the model at all.
    Raises: DatasetError, or ConfigError for a weight that human labels do not have.
    """
    if settings.labels == "human":
        if settings.calibrated or settings.weight not in ("confidence", "none"):
            raise ConfigError("--labels human: each pair has the weight 1, and no annotator's")
        pairs = read_human(settings.data)
    else:
        pairs = read_weighted(settings.data, calibrated=settings.calibrated)
    weights = weights_of(
        pairs,
        settings.weight,
        normalise=settings.normalise and settings.weight != "top",
        top_percent=settings.top_percent,
        exponent=settings.exponent,
    )
    if settings.weight == "top":
        pairs = [pair for pair, weight in zip(pairs, weights, strict=True) if weight]
        weights = weights[weights > 0]
    return pairs, weights


def tokenised(
    pairs: list[WeightedPair],
    weights: NDArray[np.float32],
    formatter: Formatter,
    max_length: int,
    output: Output,
) -> Dataset:
    """The columns prompt_ids, chosen_ids, rejected_ids and weight.

    Pairs with a text over max_length tokens are left out rather than cut, and counted in the
    results. Raises: DatasetError when none is left.
    """
    pairs_and_weights = list(zip(pairs, weights.tolist(), strict=True))

    def rows(part: Sequence[tuple[WeightedPair, float]]) -> list[dict[str, Any]]:
        prompts = [pair.prompt for pair, _ in part]
        chosen = formatter.tokenise(prompts, [pair.chosen for pair, _ in part])
        rejected = formatter.tokenise(prompts, [pair.rejected for pair, _ in part])
        return [
            _row(of_chosen, of_rejected) | {_WEIGHT_COLUMN: weight}
            for of_chosen, of_rejected, (_, weight) in zip(chosen, rejected, part, strict=True)
            if max(of_chosen.tokens, of_rejected.tokens) <= max_length
        ]

    dataset = policy.dataset_of(pairs_and_weights, rows, max_length, output)
    used = np.asarray(dataset.with_format("numpy")[_WEIGHT_COLUMN][:])
    output.results |= {"mean_weight": float(used.mean()), "max_weight": float(used.max())}
    return dataset


def _row(chosen: TokenisedText, rejected: TokenisedText) -> dict[str, list[int]]:
    # Where tokens merge across the seam, both responses start at the earlier place.
    shared = min(len(chosen.prompt_ids), len(rejected.prompt_ids))
    return {
        "prompt_ids": chosen.prompt_ids[:shared],
        "chosen_ids": chosen.prompt_ids[shared:] + chosen.response_ids,
        "rejected_ids": rejected.prompt_ids[shared:] + rejected.response_ids,
    }


def _config(settings: Align, output: Output, rows: int) -> ConfidenceDPOConfig:
    return ConfidenceDPOConfig(
        **policy.training_arguments(settings, output.folder, rows),
        loss_type=[_LOSS_TYPES.get(settings.loss, settings.loss)],
        beta=settings.tau if settings.loss == "ipo" else settings.beta,
        label_smoothing=settings.epsilon if settings.loss in ("rdpo", "cdpo") else 0.0,
        ipo_length_normalised=settings.ipo_length_normalised,
        simpo_gamma=settings.gamma,
        weight_column=_WEIGHT_COLUMN,
    )


if __name__ == "__main__":
    from cwpo_trainer.commands import Align

    cli.run(Align, sys.argv[1:], "python -m cwpo_trainer.align")
