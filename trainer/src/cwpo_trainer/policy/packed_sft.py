"""SFT on packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from cwpo_trainer.policy.packed_batch import packed_texts
from cwpo_trainer.policy.row_training import ROWS, RowTraining


class PackedSFTTrainer(RowTraining, SFTTrainer):
    """TRL's SFTTrainer, with rows of whole texts in place of padded batches.

    Datasets have the columns input_ids and labels, with texts labelled from some token to the end.

    Args:
        share_prompts: read rows, with models that allow it.
    """

    model: Any

    def __init__(self, *args: Any, share_prompts: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pack(packed_texts, wanted=share_prompts, bfloat16=self.args.bf16)

    def _items(self, inputs: dict[str, Any]) -> int:
        return int((inputs["labels"][:, 1:] >= 0).sum())

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Minus the log-probability of the labelled tokens, over their number.

        Args:
            num_items_in_batch: labelled tokens of the step over all ranks; None for those of this
                batch.
        """
        rows = inputs.pop(ROWS, None)
        if rows is None:
            return super().compute_loss(  # type: ignore[no-untyped-call]
                model, inputs, return_outputs, num_items_in_batch
            )
        found = [model(packed=row) for row in rows]
        sums, entropies, likeliest = map(torch.cat, zip(*found, strict=True))
        texts = torch.tensor([text for row in rows for text in row.row.texts])
        # Nothing predicts the first token of all.
        labelled = (inputs["labels"][texts, 1:] >= 0).sum()
        self._record("entropy", entropies.sum(), labelled)
        self._record("mean_token_accuracy", likeliest.sum(), labelled)
        self._record("num_tokens", inputs["attention_mask"][texts].sum())
        if num_items_in_batch is None:
            num_items_in_batch = labelled * self.accelerator.num_processes
        loss = self._of_step(-sums.sum(), num_items_in_batch)
        return (loss, {}) if return_outputs else loss
