"""ConfidenceDPOTrainer: TRL's DPOTrainer with a weight for each pair (eq. 7).

TRL's trainer reduces its per-pair losses inside one method, which `compute_loss` replaces here; the
weight is led to it past column removal and the collator. The prompt of a pair is read once for both
responses, in rows without padding. All else (data, reference model, distribution, checkpoints) is
TRL's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import use_adapter

from cwpo.errors import ConfigError, DatasetError
from cwpo.progress import Progress
from cwpo_trainer import weights
from cwpo_trainer.constants import Constant, names_by_constant
from cwpo_trainer.losses import (
    EPSILON,
    GAMMA,
    LENGTH_NORMALISED,
    LOSSES,
    OF_TRL_TYPE,
    Loss,
    rdpo,
    weighted_mean,
)
from cwpo_trainer.policy.packed_batch import of_chosen_and_rejected, packed_pairs, pairs_of
from cwpo_trainer.policy.packed_model import PackedResponses
from cwpo_trainer.policy.reference_cache import (
    PairLogProbs,
    ReferenceCache,
    pair_keys,
    reference_fingerprint,
)
from cwpo_trainer.policy.row_training import ROWS, Collate, PackingCollator, RowTraining
from cwpo_trainer.policy.sharding import NoReference, is_fsdp2, shard_reference
from cwpo_trainer.run import process

_WEIGHT, _EPSILON = "pair_weight", "pair_epsilon"


def _field_of(constant: Constant) -> Any:
    """The field of a constant for which TRL's config has none."""
    return field(default=constant.default, metadata={"help": f"{constant.meaning}."})


@dataclass
class ConfidenceDPOConfig(DPOConfig):
    """TRL's DPOConfig for one loss: sigmoid (CW-DPO), ipo (CW-IPO), robust (CW-rDPO) and others.

    `beta` is tau under ipo, and `label_smoothing` is epsilon under robust and cdpo, as in TRL.
    Raises: ConfigError for an option that the weighted loss would otherwise silently ignore.
    """

    weight_column: str = field(
        default="confidence",
        metadata={"help": "Column of the dataset whose value multiplies the loss of a pair."},
    )
    epsilon_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the dataset with the probability of each pair that its label is "
            "wrong, in place of label_smoothing."
        },
    )
    ipo_length_normalised: bool = _field_of(LENGTH_NORMALISED)
    simpo_gamma: float = _field_of(GAMMA)
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Read the prompt of a pair once for both responses, in rows without padding, "
            "with models that allow it; otherwise both texts of each pair, padded."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which runs keep the log-probabilities of the reference, and find "
            "those of others. Implies precompute_ref_log_probs."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        process.use_one_gpu(self)
        problem = next(self._problems(), None)
        if problem is not None:
            raise ConfigError(f"confidence-weighted DPO: {problem}")
        if self.reference_cache is not None or not self.loss.reads_reference:
            # Without a reference TRL then loads none of its own; nothing is precomputed either.
            self.precompute_ref_log_probs = True

    @property
    def pair_columns(self) -> dict[str, str]:
        """The columns with a number for each pair, by their names in a batch."""
        columns = {_WEIGHT: self.weight_column}
        return columns if self.epsilon_column is None else columns | {_EPSILON: self.epsilon_column}

    @property
    def loss(self) -> Loss:
        """The loss of a pair that loss_type names."""
        return OF_TRL_TYPE[self.loss_type[0]]

    def _problems(self) -> Iterator[str]:
        if len(self.loss_type) != 1 or self.loss_type[0] not in OF_TRL_TYPE:
            yield f"loss_type is one of {', '.join(OF_TRL_TYPE)}, not {self.loss_type}"
            return
        for constant in self.loss.constants:
            problem = constant.problem(getattr(self, constant.config_field))
            if problem is not None:
                yield f"{constant.config_field}: {problem}"
        if EPSILON not in self.loss.constants and self.label_smoothing != 0:
            names = names_by_constant(LOSSES)[EPSILON]
            smoothed = " and ".join(LOSSES[name].trl_type for name in names)
            yield f"label_smoothing belongs to {smoothed}; {self.loss_type[0]} has none"
        if self.epsilon_column is not None and EPSILON not in self.loss.constants:
            yield f"epsilon_column: {self.loss_type[0]} has no epsilon"
        if self.epsilon_column is not None and self.label_smoothing != 0:
            yield "label_smoothing and epsilon_column: give one of them"
        if self.reference_cache is not None and not self.loss.reads_reference:
            yield f"reference_cache: {self.loss_type[0]} has no reference"
        unsupported = {
            # The weights that identify the reference are sharded as soon as they are loaded.
            "reference_cache with DeepSpeed": self.reference_cache is not None
            and self.deepspeed_plugin is not None,
            "loss_weights": self.loss_weights is not None,
            "f_divergence_type": self.f_divergence_type != "reverse_kl",
            "ld_alpha": self.ld_alpha is not None,
            "use_weighting": self.use_weighting,
            "padding_free": self.padding_free,
        }
        yield from (f"{name} is not supported" for name, is_set in unsupported.items() if is_set)


class ConfidenceDPOTrainer(RowTraining, DPOTrainer):
    """Trains a policy by the mean of weight * loss over the pairs.

    Datasets are those of DPOTrainer with one more column, `args.weight_column`, or already
    tokenised (prompt_ids, chosen_ids, rejected_ids). Evaluation weights its pairs the same way.
    Raises: DatasetError for a dataset whose weights are missing or unusable; ConfigError for a
    model or option that the weighted loss does not cover.

    Attributes:
        pairs_from_cache: number of pairs of each dataset, "train" or "eval", that were found in
            `args.reference_cache`.
    """

    args: ConfidenceDPOConfig
    model: Any
    _tag_names = ["trl", "cwpo", "cw-dpo"]  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ConfigError("compute_metrics is not supported: no logits are built")
        self.pairs_from_cache: dict[str, int] = {}
        bound = inspect.signature(DPOTrainer).bind_partial(*args, **kwargs)
        given = bound.arguments
        self._given_reference = given.get("ref_model")
        if _would_load_in_vain(given):
            given["ref_model"] = NoReference()
        super().__init__(*bound.args, **bound.kwargs)
        self._given_reference = None
        if isinstance(self.ref_model, NoReference):
            self.ref_model = None
        if not isinstance(self.args, ConfidenceDPOConfig):
            raise ConfigError("ConfidenceDPOTrainer needs a ConfidenceDPOConfig as args")
        if self._is_vision_dataset:
            raise DatasetError("images are not supported")
        self._pack_once()
        if self.precompute_ref_logps and not self.args.precompute_ref_log_probs:
            self.args.precompute_ref_log_probs = True
            self._precompute_all()

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; then shards a reference, before TRL finds it unsharded."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and isinstance(self._given_reference, torch.nn.Module):
            shard_reference(self._given_reference, self.accelerator)
            # TRL would hash the reference first, which it cannot do with shards.
            self.args.precompute_ref_log_probs = False

    def _precompute_all(self) -> None:
        """Have the reference read all datasets, as TRL does where it is not sharded."""
        size = self.args.precompute_ref_batch_size
        training = size or self.args.per_device_train_batch_size
        self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", training)
        evaluating = size or self.args.per_device_eval_batch_size
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._precompute_ref_logps(dataset, name, evaluating)
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", evaluating)

    def _pack_once(self) -> None:
        if isinstance(self.data_collator, (_WeightedCollator, PackingCollator)):
            return
        collate: Any = self.data_collator
        self._collator_of_trl = repr(collate)
        self.data_collator = _WeightedCollator(collate, self.args.pair_columns)
        self._pack(packed_pairs, wanted=self.args.share_prompts, bfloat16=self.args.bf16)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        _check_weights(dataset, args.weight_column, dataset_name)
        if args.epsilon_column is not None:
            _check_epsilons(dataset, args.epsilon_column, args.loss, dataset_name)
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names):
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        columns: Any = self._signature_columns
        columns += [each for each in self.args.pair_columns.values() if each not in columns]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The dataset with the columns ref_chosen_logps and ref_rejected_logps.

        TRL's own hands them from rank to rank in a cache file, which a dataset in memory has none
        of; here each rank gathers them.
        """
        if not self.args.loss.reads_reference:
            return dataset
        self._pack_once()
        if self.args.reference_cache is None:
            parts = [*self._reference_log_probs(dataset, batch_size)]
            chosen, rejected = torch.cat(parts, dim=1).float().cpu().numpy()
        else:
            cached = self._cached_log_probs(dataset, name, batch_size, self.args.reference_cache)
            chosen, rejected = np.array(cached, dtype=np.float32).T
        with_chosen = self._in_order(dataset).add_column("ref_chosen_logps", chosen)
        return with_chosen.add_column("ref_rejected_logps", rejected)

    def _in_order(self, dataset: Dataset) -> Dataset:
        """The dataset, to which columns can be added; on disk, if it is a selection of rows.

        Datasets itself would write the selected rows to wherever all of them are cached.
        """
        if dataset._indices is None or not dataset.cache_files:
            return dataset
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        return dataset.flatten_indices(
            cache_file_name=str(folder / f"selected-{dataset._fingerprint}.arrow")
        )

    def _cached_log_probs(
        self, dataset: Dataset, name: str, batch_size: int, folder: str
    ) -> list[PairLogProbs]:
        """Of each pair, from the cache or else by the reference, which then adds them to it.

        The first process alone touches the disk, so that all agree on what is there.
        """
        fingerprint = self._reference_fingerprint
        cache = ReferenceCache(Path(folder), fingerprint) if process.is_main() else None
        pairs = pair_keys(dataset)
        known: dict[bytes, PairLogProbs] = {} if cache is None else cache.read(pairs)
        (known,) = broadcast_object_list([known])
        rows = {pair: row for row, pair in enumerate(pairs) if pair not in known}
        self.pairs_from_cache[name] = found = sum(pair in known for pair in pairs)
        if process.is_main():
            of_all = f"{found:,} of {len(pairs):,} {name} pairs"
            print(f"reference cache: {of_all} found in {folder}", file=sys.stderr)
        if rows:
            unread = iter(rows)
            missing = dataset.select([*rows.values()])
            for log_probs in self._reference_log_probs(missing, batch_size):
                of_pairs = map(tuple, log_probs.T.tolist())
                read = dict(zip(islice(unread, log_probs.shape[1]), of_pairs, strict=True))
                known |= read
                if cache is not None:
                    cache.add(read)
        if cache is not None:
            cache.write()
        return [known[pair] for pair in pairs]

    @cached_property
    def _reference_fingerprint(self) -> str:
        model = self.ref_model or self.model
        is_own = self.ref_model is None and isinstance(model, PeftModel)
        return reference_fingerprint(
            model,
            trained_adapter=model.active_adapter if is_own else None,
            collator=self._collator_of_trl,
            is_packed=self.unpacked_because is None,
            precision=self.accelerator.mixed_precision,
        )

    def _reference_log_probs(self, dataset: Dataset, batch_size: int) -> Iterator[Tensor]:
        """Of the pairs of all processes together, batch by batch, shape (2, pairs)."""
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        )
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            # One for both datasets: a second one on the same model would disturb its training.
            if self._precompute_engine is None:
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        progress = Progress("precompute reference", unit="pairs", total=len(dataset))
        with progress if process.is_main() else nullcontext():
            for batch in loader:
                log_probs = self.compute_ref_log_probs(model, batch)
                gathered = torch.stack(self.accelerator.gather_for_metrics(log_probs))
                yield gathered
                if process.is_main():
                    progress.advance(gathered.shape[1])

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Log-probabilities of both responses under the reference, each shape (n,)."""
        if not inputs.get(ROWS):
            return super().compute_ref_log_probs(  # type: ignore[no-untyped-call]
                model, _of_trl(inputs)
            )
        with torch.no_grad(), self._reference_adapter(), self.accelerator.autocast():
            chosen, rejected = self._read(model, inputs).log_probs
        return chosen, rejected

    def _reference_adapter(self) -> AbstractContextManager[Any]:
        """Inside the block, a model with adapters is its own reference."""
        if self.ref_model is not None or not isinstance(self.model, PeftModel):
            return nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        return use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)

    def _items(self, inputs: dict[str, Any]) -> int:
        return len(inputs[_WEIGHT])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum of weight * loss over the pairs, over their number.

        To it is added what balances a mixture of experts, as in TRL: a loss of the whole batch,
        which no weight of a pair multiplies.

        Args:
            num_items_in_batch: pairs of the step over all ranks, whose gradients are averaged; None
                for those of this batch.
        """
        if return_outputs:
            raise ConfigError("only losses are computed; use evaluate() rather than predict()")
        read = self._read(model, inputs)
        chosen, rejected = read.log_probs
        if not self.args.loss.reads_reference:
            reference = chosen.new_zeros(chosen.shape), rejected.new_zeros(rejected.shape)
        elif self.precompute_ref_logps:
            reference = tuple(
                inputs[f"ref_{of}_logps"][read.pairs] for of in ("chosen", "rejected")
            )
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        weights = inputs[_WEIGHT][read.pairs]
        epsilons = inputs[_EPSILON][read.pairs] if _EPSILON in inputs else None
        losses = self._pair_losses((chosen, rejected, *reference), read.tokens, epsilons)
        self._record_all(read, reference, losses.detach(), weights)
        no_balance = torch.zeros((), device=losses.device)
        balance = no_balance if read.aux_loss is None else self.router_aux_loss_coef * read.aux_loss
        if num_items_in_batch is None:
            return weighted_mean(weights, losses) + balance
        total = (weights * losses).sum() + len(losses) * balance
        return self._of_step(total, num_items_in_batch)

    def _read(self, model: Any, inputs: dict[str, Any]) -> _Read:
        rows = inputs.get(ROWS)
        log_probs, entropy, pairs, aux_loss = (
            (*self._read_rows(model, rows), None) if rows else self._read_padded(model, inputs)
        )
        # All texts of a batch stand below each other: those that are chosen, those that are not.
        of_all = ("completion_mask", "attention_mask")
        completion, attention = (inputs[name].view(2, -1, inputs[name].shape[1]) for name in of_all)
        return _Read(
            pairs,
            log_probs,
            entropy,
            completion_tokens=completion[:, pairs, 1:].sum(),
            tokens=completion[:, pairs].sum(dim=2).clamp(min=1),
            tokens_in_all=attention[:, pairs].sum(),
            aux_loss=aux_loss,
        )

    def _read_rows(self, model: Any, rows: list[PackedResponses]) -> tuple[Tensor, Tensor, Tensor]:
        found = [model(packed=row) for row in rows]
        parts = [(row, one.sums) for row, one in zip(rows, found, strict=True)]
        log_probs = torch.cat([of_chosen_and_rejected(*part) for part in parts], dim=1)
        pairs = torch.tensor([pair for row in rows for pair in pairs_of(row)])
        order = pairs.argsort()
        entropy = torch.stack([one.entropies.sum() for one in found]).sum()
        on_device = log_probs.device
        return log_probs[:, order.to(on_device)], entropy, pairs[order].to(on_device)

    def _read_padded(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        log_probs = outputs.log_probs.sum(dim=1).view(2, -1)
        pairs = torch.arange(log_probs.shape[1], device=log_probs.device)
        aux_loss = outputs.aux_loss if self.aux_loss_enabled else None
        return log_probs, outputs.entropy.detach().sum(), pairs, aux_loss

    def _pair_losses(
        self,
        log_probs: tuple[Tensor, Tensor, Tensor, Tensor],
        tokens: Tensor,
        epsilons: Tensor | None,
    ) -> Tensor:
        loss = self.args.loss
        constants: dict[str, Any] = {
            constant.argument: getattr(self.args, constant.config_field)
            for constant in loss.constants
        }
        if epsilons is not None:
            constants["epsilon"] = epsilons
        if loss.takes_tokens:
            constants |= {"chosen_tokens": tokens[0], "rejected_tokens": tokens[1]}
        return loss.function(*(log_probs if loss.reads_reference else log_probs[:2]), **constants)

    def _record_all(
        self, read: _Read, reference: tuple[Tensor, ...], losses: Tensor, weights: Tensor
    ) -> None:
        """Keep what `log` shows under TRL's names, beside it the unweighted loss and the weight.

        Without a reference, the reward of a response is beta times its mean log-probability a
        token, as SimPO and ORPO have it.
        """
        log_probs = read.log_probs.detach()
        chosen, rejected = log_probs
        if self.args.loss.reads_reference:
            reward_chosen = self.beta * (chosen - reference[0])
            reward_rejected = self.beta * (rejected - reference[1])
        else:
            reward_chosen, reward_rejected = self.beta * log_probs / read.tokens
        of_pair = {
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "rewards/margins": reward_chosen - reward_rejected,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "unweighted_loss": losses,
            "weight": weights,
        }
        for name, values in of_pair.items():
            self._record(name, values.sum(), len(values))
        self._record("entropy", read.entropy, read.completion_tokens)
        self._record("num_tokens", read.tokens_in_all)
        if read.aux_loss is not None:
            self._record("aux_loss", read.aux_loss.detach())


@dataclass(frozen=True, slots=True)
class _Read:
    """What a model has made of pairs.

    pairs: their places in the batch, ascending, shape (n,); log_probs: of the responses, shape
    (2, n), chosen before rejected; entropy: in nats, summed over the tokens of all responses;
    completion_tokens: number of these; tokens: of each response, shape (2, n); tokens_in_all: of
    both texts of each pair; aux_loss: of a mixture of experts, that of the batch.
    """

    pairs: Tensor
    log_probs: Tensor
    entropy: Tensor
    completion_tokens: Tensor
    tokens: Tensor
    tokens_in_all: Tensor
    aux_loss: Tensor | None


@dataclass
class _WeightedCollator:
    """Adds the numbers of the pairs, float32 of shape (n,), to the batch that TRL's collator makes.

    Args:
        columns: their columns, by the names that they have in a batch.
    """

    collate: Collate
    columns: Mapping[str, str]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        for name, column in self.columns.items():
            values = [example[column] for example in examples]
            batch[name] = torch.tensor(values, dtype=torch.float32)
        return batch


def _would_load_in_vain(given: Mapping[str, Any]) -> bool:
    """Whether TRL would load a reference that the loss has not; given the trainer's arguments."""
    config = given.get("args")
    if not isinstance(config, ConfidenceDPOConfig) or config.loss.reads_reference:
        return False
    has_adapter = given.get("peft_config") is not None or isinstance(given.get("model"), PeftModel)
    return given.get("ref_model") is None and not has_adapter and is_fsdp2(config)


def _of_trl(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch as TRL's collator has made it."""
    return {name: value for name, value in inputs.items() if name not in (_WEIGHT, _EPSILON, ROWS)}


def _check_weights(dataset: Dataset, column: str, name: str) -> None:
    if not isinstance(dataset, Dataset):
        raise DatasetError(f"the {name} dataset is streamed, so its weights cannot be checked")
    if column not in dataset.column_names:
        raise DatasetError(
            f"the {name} dataset has no column {column!r} to weight its pairs by; annotate it "
            "with `cwpo annotate`"
        )
    weights.checked(np.asarray(dataset.with_format("numpy")[column][:], dtype=np.float32))


def _check_epsilons(dataset: Dataset, column: str, loss: Loss, name: str) -> None:
    if column not in dataset.column_names:
        raise DatasetError(f"the {name} dataset has no column {column!r} to take epsilon from")
    values = np.asarray(dataset.with_format("numpy")[column][:], dtype=np.float32)
    # Where nothing is known of a label, the robust loss divides by 0.
    is_below = values <= 0.5 if loss.function is not rdpo else values < 0.5
    bad = np.flatnonzero(~((values >= 0) & is_below))
    if bad.size:
        raise DatasetError(
            f"pair {bad[0] + 1} of the {name} dataset has the epsilon {values[bad[0]]}; an epsilon "
            "is at least 0 and at most 1/2, or below it under robust"
        )
