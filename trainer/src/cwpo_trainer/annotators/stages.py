"""How each kind of annotator is trained: with a scalar head, or by its implicit reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cwpo_annotator.backends.torch.hardware.device import best_device
from cwpo_annotator.checkpoint import IMPLICIT, REFERENCE_NAME
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_trainer import losses
from cwpo_trainer.annotators.base_model import (
    add_lora,
    checkpoint_activations,
    load_causal,
    load_with_scalar_head,
    merge_lora,
)
from cwpo_trainer.annotators.forward import E, Root
from cwpo_trainer.annotators.implicit_reward import ImplicitRewardScorer, ResponseReader
from cwpo_trainer.annotators.objectives import (
    PairScorer,
    PreferenceObjective,
    SupervisedFineTuning,
)
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.annotators.shards import gather, shard
from cwpo_trainer.annotators.train_loop import Stage, TrainLoop
from cwpo_trainer.annotators.validation import Validation
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import LOG_NAME, SFT_LOG_NAME
from cwpo_trainer.settings.annotator_training import AnnotatorObjective, EarlyStopping
from cwpo_trainer.settings.mixins import LoraDropout

_ANNOTATOR, _SFT = "annotator", "SFT"


@dataclass(frozen=True)
class AnnotatorStages:
    """Trains an annotator on encoded pairs, of which a is the chosen response.

    base: folder of the pretrained model; layers: how many of its first to keep, None for all;
    checkpointing: whether activations are computed again in the backward pass;
    bfloat16: whether training computes in it; folder: for logs, and for the reference of an
    implicit reward; training, prompts: pairs to train on, and the prompt of each; validating: pairs
    to choose weights and temperature by.
    """

    base: Path
    layers: int | None
    lora: LoraDropout
    checkpointing: bool
    objective: AnnotatorObjective
    stopping: EarlyStopping
    bfloat16: bool
    loop: TrainLoop
    folder: Path
    training: Sequence[EncodedPair]
    prompts: Sequence[str]
    validating: Sequence[EncodedPair]

    def train(self, encoder: Encoder) -> tuple[Any, Validation[Any]]:
        """The trained model with its best weights, and the validation that chose them.

        Raises: CheckpointError or ConfigError for a base model that cannot be trained so.
        """
        if self.objective.objective in IMPLICIT:
            return self._implicit_reward()
        return self._scalar_head(encoder)

    def _scalar_head(self, encoder: Encoder) -> tuple[Any, Validation[Any]]:
        """A model that scores each response (bt), or both read together (pairrm)."""
        model = load_with_scalar_head(self.base, encoder, layers=self.layers)
        self._prepare(model)
        scorer = ScalarHeadScorer(
            self._placed(model), encoder.pad_token_id, self.loop.budget, bfloat16=self.bfloat16
        )
        self._share(scorer.root, bfloat16=self.bfloat16)
        validation = self._train(scorer, self.training, self.validating)
        self._finish(scorer)
        return model, validation

    def _implicit_reward(self) -> tuple[Any, Validation[Any]]:
        """A language model trained by DPO, after SFT for sft+dpo.

        What DPO starts from is its reference, and written to the folder.
        """
        reference = self.folder / REFERENCE_NAME
        is_resumed = self.loop.checkpoints.resumed_in(_ANNOTATOR)
        model = load_causal(reference if is_resumed else self.base, layers=self.layers)
        sft_steps = 0
        if self.objective.objective == "sft+dpo":
            sft_steps = self.loop.steps(len(self.training), self.objective.sft_epochs)
            if not is_resumed:
                self._fine_tune(model, sft_steps)
        if not is_resumed and process.is_main():
            model.save_pretrained(reference)
        if sft_steps and not is_resumed and self.loop.ranks.share_model:
            # Only the first process has it whole.
            self.loop.ranks.wait()
            model = load_causal(reference, layers=self.layers)
        self._prepare(model)
        reader = ResponseReader(self._placed(model), self.loop.budget)
        # An implicit reward is measured in float32, as it is served.
        self._share(reader.root, bfloat16=False)
        ranks = self.loop.ranks
        training = reader.with_reference(self.training, ranks, bfloat16=self.bfloat16)
        validating = reader.with_reference(self.validating, ranks, bfloat16=False)
        scorer = ImplicitRewardScorer(reader, beta=self.objective.beta, bfloat16=self.bfloat16)
        validation = self._train(scorer, training, validating, steps_before=sft_steps)
        self._finish(reader)
        return model, validation

    def _fine_tune(self, model: Any, steps: int) -> None:
        """SFT: raise the log-probability of the chosen responses."""
        self._prepare(model)
        reader = ResponseReader(self._placed(model), self.loop.budget)
        self._share(reader.root, bfloat16=self.bfloat16)
        objective = SupervisedFineTuning(reader, bfloat16=self.bfloat16)
        chosen = [EncodedText(pair.a, pair.truncated, pair.start) for pair in self.training]
        self.loop.run(
            Stage(_SFT, objective, chosen, self.prompts, steps, self.folder / SFT_LOG_NAME)
        )
        self._finish(reader)
        # In training each process drew numbers of its own; the next adapters are those of all.
        torch.manual_seed(self.loop.seed)

    def _prepare(self, model: Any) -> None:
        """Set up what is trained of the model, and what is kept for the backward pass."""
        if self.checkpointing:
            checkpoint_activations(model)
        add_lora(model, self.lora)

    def _placed(self, model: Any) -> Any:
        """The model on the device; one that is to be shared may be too large for that."""
        return model if self.loop.ranks.share_model else model.to(best_device())

    def _share(self, root: Root, *, bfloat16: bool) -> None:
        if self.loop.ranks.share_model:
            shard(root, self.loop.ranks, bfloat16=bfloat16)

    def _finish(self, trained: ScalarHeadScorer | ResponseReader) -> None:
        """Make a plain model of what was trained; of a shared one, in the first process."""
        trained.restore()
        if self.loop.ranks.share_model:
            gather(trained.root)
        merge_lora(trained.model)

    def _train(
        self,
        scorer: PairScorer[E],
        training: Sequence[E],
        validating: Sequence[E],
        *,
        steps_before: int = 0,
    ) -> Validation[E]:
        """Train the model as an annotator; it keeps the weights with the lowest validation loss."""
        validation = Validation(
            scorer,
            validating,
            every=self.stopping.validate_every or self.loop.steps_of_epoch(len(training)),
            patience=self.stopping.patience,
        )
        stage = Stage(
            _ANNOTATOR,
            PreferenceObjective(scorer, self._loss),
            training,
            self.prompts,
            self.loop.steps(len(training), self.loop.optimisation.epochs),
            self.folder / LOG_NAME,
            validation,
            steps_before,
        )
        self.loop.run(stage)
        return validation

    def _loss(self, scores: Tensor) -> Tensor:
        a, b = scores[:, 0], scores[:, 1]
        smoothing = self.objective.label_smoothing
        if self.objective.objective == "pairrm":
            return losses.pairwise(a, b, label_smoothing=smoothing)
        # Over implicit rewards eq. 5 is DPO, eq. 9 with C = 1; they have no margin.
        return losses.bradley_terry(a - b, margin=self.objective.margin, label_smoothing=smoothing)
