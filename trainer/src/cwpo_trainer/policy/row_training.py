"""What TRL's trainers need to read their batches as packed rows, one after the other."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor

from cwpo_trainer.plan.row_sizes import row_tokens
from cwpo_trainer.policy.packed_model import PackedResponses, add_packed_forward, read_packed
from cwpo_trainer.policy.step_figures import StepFigures
from cwpo_trainer.run import process

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

ROWS = "packed_rows"

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class PackingCollator:
    """Adds to the batch that another collator makes the rows that it is packed into."""

    collate: Collate
    pack: Callable[[dict[str, Any]], list[PackedResponses]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these examples."""
        batch = self.collate(examples)
        return batch | {ROWS: self.pack(batch)}


class RowTraining(Trainer):
    """A mixin before one of TRL's trainers, whose losses are sums over items: pairs, or tokens.

    Activations of one row exist at a time, whatever the size of a batch. Gradients are those of the
    mean over all items of a step, whatever the sizes of its batches.

    Attributes:
        unpacked_because: why texts are read by themselves, padded; None where rows are packed.
    """

    model: Any
    unpacked_because: str | None
    ref_model: Any = None
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    loss_is_scaled_for_ga: Any = True
    _total_train_tokens: int
    _tp_size: int
    _metrics: Any

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        # TRL rounds the adapter of a 4-bit model to bfloat16; one to train further is put back.
        trained = {}
        if isinstance(model, PeftModel):
            of_model = model.named_parameters()
            trained = {name: weight.data for name, weight in of_model if weight.requires_grad}
        super().__init__(model, *args, **kwargs)
        for name, weight in self.model.named_parameters():
            if name in trained and weight.dtype != trained[name].dtype:
                weight.data = trained[name].to(weight.device)

    @abstractmethod
    def _items(self, inputs: dict[str, Any]) -> int:
        """Number of items of a batch."""

    def _pack(
        self, pack: Callable[..., list[PackedResponses]], *, wanted: bool, bfloat16: bool | None
    ) -> None:
        """Have collator and models read packed rows, if they can."""
        self._figures = {"train": StepFigures(), "eval": StepFigures()}
        # Else they are those of the first process, which tries them.
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        has_weights = process.is_main() or not (plugin and plugin.cpu_ram_efficient_loading)
        reason = None if wanted else "sharing prompts is switched off"
        if wanted and has_weights:
            reason = self._refused(bool(bfloat16))
        tried = gather_object([(reason, self.model.config._attn_implementation)])
        # What one process cannot do, none does.
        self.unpacked_because = next((found for found, _ in tried if found is not None), None)
        if self.unpacked_because is None and not has_weights:
            self._follow(attention=tried[0][1])
        if self.unpacked_because is not None:
            if wanted and process.is_main():
                print(
                    f"each text is read by itself, padded: {self.unpacked_because}", file=sys.stderr
                )
        else:
            # Ranks that share a model read equally many rows.
            tokens = None if self.is_fsdp_enabled else row_tokens(self.accelerator.device.type)
            collate: Any = self.data_collator
            self.data_collator = PackingCollator(collate, partial(pack, tokens=tokens))

    def _refused(self, bfloat16: bool) -> str | None:
        if self.is_deepspeed_enabled:
            return "DeepSpeed is not supported"
        if self.aux_loss_enabled:
            return "the balance of a mixture of experts is that of a whole batch"
        reason = read_packed(self.model, bfloat16=bfloat16)
        if reason is not None or self.ref_model is None:
            return reason
        if not self.is_fsdp_enabled:
            return read_packed(self.ref_model, bfloat16=bfloat16)
        # It is sharded already, and cannot be tried.
        if self.ref_model.config.model_type != self.model.config.model_type:
            return "policy and reference are of different architectures"
        _read_rows(self.ref_model, self.model.config._attn_implementation)
        return None

    def _follow(self, attention: str) -> None:
        """Have models read rows as the first process has found that its own can."""
        for model in (self.model, self.ref_model):
            if model is not None:
                _read_rows(
                    model.get_base_model() if isinstance(model, PeftModel) else model, attention
                )

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The batches of a step, and how many items all ranks have in it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.tensor(sum(map(self._items, batches)), device=device)
        return batches, self.accelerator.reduce(items, "sum")

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch after its backward pass, row by row.

        Args:
            num_items_in_batch: items of the step over all ranks; None for those of this batch.
        """
        items = num_items_in_batch
        if items is None:
            items = self._items(inputs) * self.accelerator.num_processes
        # What is not packed is one row.
        rows = inputs.get(ROWS) or [None]
        total = torch.zeros((), device=self.args.device)
        for row in rows:
            part = inputs if row is None else inputs | {ROWS: [row]}
            with nullcontext() if row is rows[-1] else self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch=items)
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means, over all ranks, of what was recorded since the last time."""
        mode = "train" if self.model.training else "eval"
        means, sums = self._figures[mode].take(self.accelerator)
        if means:
            if mode == "train":
                self._total_train_tokens += round(sums["num_tokens"]) // self._tp_size
            means["num_tokens"] = self._total_train_tokens
            self._metrics[mode].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    def _record(self, name: str, total: Tensor, count: Tensor | int = 1) -> None:
        """Keep a sum of so many values for `log`, which shows their mean."""
        self._figures["train" if self.model.training else "eval"].add(name, total, count=count)

    def _of_step(self, total: Tensor, items: Tensor | int) -> Tensor:
        """A sum over items of this rank as a share of the mean over all items of a step."""
        share: Tensor = total * self.accelerator.num_processes / items
        return share


def _read_rows(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    add_packed_forward(model)
