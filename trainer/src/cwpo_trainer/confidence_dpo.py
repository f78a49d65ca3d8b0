"""ConfidenceDPOTrainer: TRL's DPOTrainer with a weight for each pair (eq. 7).

TRL's trainer reduces its per-pair losses inside one method, `_compute_loss`; that method is
replaced here, and the weight is led to it past column removal and the collator. All else (data,
reference model, distribution, checkpoints) is TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from cwpo.errors import ConfigError, DatasetError
from cwpo_trainer import losses, weights

# The first four are TRL's names; the last two need no reference.
LOSSES = ("sigmoid", "hinge", "ipo", "robust", "cdpo", "simpo", "orpo")
_WITH_FLIPPED_LABELS = ("robust", "cdpo")
_WEIGHT = "pair_weight"


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
    ipo_length_normalised: bool = field(
        default=True,
        metadata={"help": "IPO on mean log-ratios a token (TRL) rather than sums (eq. 10)."},
    )

    simpo_gamma: float = field(
        default=0.5, metadata={"help": "Margin that simpo aims at, after beta."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        for problem in self._problems():
            raise ConfigError(f"confidence-weighted DPO: {problem}")
        if self.loss_type[0] in losses.REFERENCE_FREE:
            # TRL then loads no reference of its own; there is nothing to precompute either.
            self.precompute_ref_log_probs = True

    def _problems(self) -> Iterator[str]:
        if len(self.loss_type) != 1 or self.loss_type[0] not in LOSSES:
            yield f"loss_type is one of {', '.join(LOSSES)}, not {self.loss_type}"
        elif self.loss_type[0] in _WITH_FLIPPED_LABELS:
            if not 0 <= self.label_smoothing < 0.5:
                yield f"label_smoothing is in [0, 0.5), not {self.label_smoothing}"
        elif self.label_smoothing != 0:
            yield f"label_smoothing belongs to robust and cdpo; {self.loss_type[0]} has none"
        unsupported = {
            "loss_weights": self.loss_weights is not None,
            "f_divergence_type": self.f_divergence_type != "reverse_kl",
            "ld_alpha": self.ld_alpha is not None,
            "use_weighting": self.use_weighting,
            "padding_free": self.padding_free,
            "router_aux_loss_coef": bool(self.router_aux_loss_coef),
        }
        yield from (f"{name} is not supported" for name, is_set in unsupported.items() if is_set)


class ConfidenceDPOTrainer(DPOTrainer):
    """Trains a policy by the mean of weight * loss over the pairs.

    Datasets are those of DPOTrainer with one more column, `args.weight_column`, or already
    tokenised (prompt_ids, chosen_ids, rejected_ids). Evaluation weights its pairs the same way.
    Raises: DatasetError for a dataset whose weights are missing or unusable; ConfigError for a
    model or option that the weighted loss does not cover.
    """

    args: ConfidenceDPOConfig
    model: Any
    _tag_names = ["trl", "cwpo", "cw-dpo"]  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ConfigError("compute_metrics is not supported: no logits are built")
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, ConfidenceDPOConfig):
            raise ConfigError("ConfidenceDPOTrainer needs a ConfidenceDPOConfig as args")
        if self.aux_loss_enabled:
            raise ConfigError(
                "the model adds a mixture-of-experts loss, which is no loss of a pair: set its "
                "config's router_aux_loss_coef to 0"
            )
        if self._is_vision_dataset:
            raise DatasetError("images are not supported")
        self.data_collator = _WeightedCollator(self.data_collator, self.args.weight_column)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        _check_weights(dataset, args.weight_column, dataset_name)
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names):
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        columns: Any = self._signature_columns
        if self.args.weight_column not in columns:
            columns.append(self.args.weight_column)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The dataset with the columns ref_chosen_logps and ref_rejected_logps.

        TRL's own hands them from rank to rank in a cache file, which a dataset in memory has none
        of; here each rank gathers them.
        """
        if self.args.loss_type[0] in losses.REFERENCE_FREE:
            return dataset
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        )
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            # One for both datasets: a second one on the same model would disturb its training.
            if self._precompute_engine is None:
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        parts = [
            torch.stack(
                self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            )
            for batch in loader
        ]
        chosen, rejected = torch.cat(parts, dim=1).float().cpu().numpy()
        with_chosen = dataset.add_column("ref_chosen_logps", chosen)
        return with_chosen.add_column("ref_rejected_logps", rejected)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        """Log-probabilities of both responses under the reference, each shape (n,)."""
        return super().compute_ref_log_probs(  # type: ignore[no-untyped-call]
            model, _without_weight(inputs)
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        if return_outputs:
            raise ConfigError("only losses are computed; use evaluate() rather than predict()")
        completion = inputs["completion_mask"]
        outputs = self._forward(model, inputs)
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        if self.args.loss_type[0] in losses.REFERENCE_FREE:
            reference = chosen.new_zeros(chosen.shape), rejected.new_zeros(rejected.shape)
        elif self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        log_probs = (chosen, rejected, *reference)
        pair_losses = self._pair_losses(log_probs, completion.sum(dim=1).clamp(min=1).chunk(2))
        self._record(inputs, outputs, [part.detach() for part in log_probs], pair_losses.detach())
        return losses.weighted_mean(inputs[_WEIGHT], pair_losses)

    def _forward(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
        )

    def _pair_losses(
        self, log_probs: tuple[Tensor, Tensor, Tensor, Tensor], tokens: tuple[Tensor, ...]
    ) -> Tensor:
        loss, beta = self.loss_types[0], self.beta
        chosen, rejected = tokens
        if loss == "simpo":
            return losses.simpo(
                *log_probs[:2],
                beta=beta,
                gamma=self.args.simpo_gamma,
                chosen_tokens=chosen,
                rejected_tokens=rejected,
            )
        if loss == "orpo":
            return losses.orpo(
                *log_probs[:2], beta=beta, chosen_tokens=chosen, rejected_tokens=rejected
            )
        if loss in _WITH_FLIPPED_LABELS:
            function = losses.rdpo if loss == "robust" else losses.cdpo
            return function(*log_probs, beta=beta, epsilon=self.label_smoothing)
        if loss == "ipo":
            lengths = tokens if self.args.ipo_length_normalised else (None, None)
            return losses.ipo(
                *log_probs, tau=beta, chosen_tokens=lengths[0], rejected_tokens=lengths[1]
            )
        return (losses.hinge if loss == "hinge" else losses.dpo)(*log_probs, beta=beta)

    def _record(
        self,
        inputs: dict[str, Tensor],
        outputs: Any,
        log_probs: list[Tensor],
        pair_losses: Tensor,
    ) -> None:
        """Log under TRL's names, and the unweighted loss and the mean weight beside them.

        Without a reference, the reward of a response is beta times its log-probability.
        """
        chosen, rejected, reference_chosen, reference_rejected = log_probs
        reward_chosen = self.beta * (chosen - reference_chosen)
        reward_rejected = self.beta * (rejected - reference_rejected)
        of_pair = {
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "rewards/margins": reward_chosen - reward_rejected,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "unweighted_loss": pair_losses,
            "weight": inputs[_WEIGHT],
        }
        of_batch = [
            outputs.entropy.detach().sum(),
            inputs["completion_mask"][:, 1:].sum(),
            inputs["attention_mask"].sum(),
        ]
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        means = self.accelerator.gather(torch.stack([*of_pair.values()], dim=1)).mean(dim=0)
        for name, value in zip(of_pair, means.tolist(), strict=True):
            metrics[name].append(value)
        sums = self.accelerator.gather(torch.stack(of_batch)[None]).sum(dim=0)
        entropy, completion_tokens, tokens = sums.tolist()
        metrics["entropy"].append(entropy / max(completion_tokens, 1.0))
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]


@dataclass
class _WeightedCollator:
    """Adds the weights, float32 of shape (n,), to the batch that TRL's collator makes."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    column: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        batch[_WEIGHT] = torch.tensor(
            [example[self.column] for example in examples], dtype=torch.float32
        )
        return batch


def _without_weight(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != _WEIGHT}


def _check_weights(dataset: Dataset, column: str, name: str) -> None:
    if not isinstance(dataset, Dataset):
        raise DatasetError(f"the {name} dataset is streamed, so its weights cannot be checked")
    if column not in dataset.column_names:
        raise DatasetError(
            f"the {name} dataset has no column {column!r} to weight its pairs by; annotate it "
            "with `cwpo annotate`"
        )
    weights.checked(np.asarray(dataset.with_format("numpy")[column][:], dtype=np.float32))
