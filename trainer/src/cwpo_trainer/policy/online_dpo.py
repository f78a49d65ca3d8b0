"""OnlineDPOTrainer: ConfidenceDPOTrainer on pairs that the policy makes in each step (App. J.5).

TRL's own online trainer has a loss without weights, and reads padded texts; here only what a step
trains on is made another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOTrainer
from cwpo_trainer.policy.online_pairs import OnlinePair, OnlinePairs
from cwpo_trainer.policy.online_record import OnlineRecord
from cwpo_trainer.policy.sampling import TransformersPolicy

_PROMPT_INDEX = "prompt_index"


class OnlineDPOTrainer(ConfidenceDPOTrainer):
    """Trains a policy on the pairs that it makes of prompts, each step on those of its own weights.

    A batch is one of prompts. All of a step, over all its forward passes, are answered and
    annotated before its gradients; each process does so for its own prompts.

    Args:
        prompts: number of the prompts that `pairs` knows.
        pairs: makes pairs of prompts.
        record: takes the pairs of all processes; None in all but the first.
    """

    _tag_names = ["trl", "cwpo", "online-cw-dpo"]  # noqa: RUF012

    def __init__(
        self, *args: Any, prompts: int, pairs: OnlinePairs, record: OnlineRecord | None, **more: Any
    ) -> None:
        dataset = Dataset.from_dict({_PROMPT_INDEX: [*range(prompts)]})
        super().__init__(*args, train_dataset=dataset, **more)
        tokenizer: Any = self.processing_class
        self._policy = TransformersPolicy(self.model, tokenizer, is_shared=self.is_fsdp_enabled)
        self._pairs = pairs
        self._kept = record
        self._is_started = False

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        if _PROMPT_INDEX in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if _PROMPT_INDEX not in columns:
            columns.append(_PROMPT_INDEX)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of prompts, by their indices."""
        collate = self.data_collator
        self.data_collator = default_collate
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The batches of a step, made of its prompts, and how many pairs all ranks have in it."""
        drawn = [batch[_PROMPT_INDEX].tolist() for batch in islice(epoch_iterator, num_batches)]
        made = iter(self._made([index for indices in drawn for index in indices]))
        collate: Any = self.data_collator
        batches = [collate([*islice(made, len(indices))]) for indices in drawn]
        return super().get_batch_samples(iter(batches), len(batches), device)

    def _made(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples that the policy, as it is now, makes of prompts."""
        step = self.state.global_step + 1
        self.model.eval()
        with self.accelerator.autocast():
            pairs = self._pairs.made(self._policy, indices, step)
        self.model.train()
        self._keep(step, pairs)
        self._record_pairs(pairs)
        return [pair.example for pair in pairs]

    def _keep(self, step: int, pairs: Sequence[OnlinePair]) -> None:
        rows = gather_object([pair.row for pair in pairs if pair.row is not None])
        if self._kept is None:
            return
        if not self._is_started:
            self._kept.start(after=step - 1)
            self._is_started = True
        self._kept.add(step, rows)

    def _record_pairs(self, pairs: Sequence[OnlinePair]) -> None:
        rows = [pair.row for pair in pairs if pair.row is not None]
        answers = [pair.example[f"{of}_ids"] for pair in pairs for of in ("chosen", "rejected")]
        of_step = {
            "mean_confidence": [row["confidence"] for row in rows],
            "mean_score": [row[f"score_{of}"] for row in rows for of in ("chosen", "rejected")],
            "completions/mean_length": [*map(len, answers)],
            "annotated": [float(pair.row is not None) for pair in pairs],
        }
        for name, values in of_step.items():
            total = torch.tensor(float(sum(values)), device=self.args.device)
            self._record(name, total, len(values))

    def _record_all(
        self, read: Any, reference: tuple[Tensor, ...], losses: Tensor, weights: Tensor
    ) -> None:
        """As for other pairs, of those that have a weight, and the KL divergence of their answers.

        It is estimated, in nats an answer, as the mean of log(policy / reference) over answers that
        the policy has sampled itself.
        """
        has_weight = weights > 0
        log_probs, tokens = read.log_probs[:, has_weight], read.tokens[:, has_weight]
        read = replace(read, log_probs=log_probs, tokens=tokens)
        reference = tuple(of_reference[has_weight] for of_reference in reference)
        super()._record_all(read, reference, losses[has_weight], weights[has_weight])
        if self.args.loss.reads_reference:
            ratios = log_probs.detach() - torch.stack(reference)
            self._record("kl", ratios.sum(), ratios.numel())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the drift over the latest pairs, too."""
        if "loss" in logs and self._kept is not None and self._kept.drift is not None:
            logs = logs | {"drift": self._kept.drift}
        super().log(logs, start_time)
