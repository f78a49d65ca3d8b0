"""The train loop of all annotators: AdamW over the examples of random prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from cwpo_trainer.annotators.checkpoints import Checkpoints
from cwpo_trainer.annotators.forward import E, PassBudget, most_tokens
from cwpo_trainer.annotators.objectives import Objective
from cwpo_trainer.annotators.ranks import Ranks
from cwpo_trainer.annotators.shards import part_of, whole_of
from cwpo_trainer.annotators.validation import Validation, trainable
from cwpo_trainer.plan.schedule import annotator_steps, steps_between_checkpoints, warmup_steps
from cwpo_trainer.run import process
from cwpo_trainer.run.log import TrainingLog
from cwpo_trainer.run.termination import Termination, leave_stopped
from cwpo_trainer.settings.mixins import Optimisation


@dataclass(frozen=True)
class Stage(Generic[E]):
    """What is trained on which examples, and for how long; SFT and DPO are two stages of one run.

    prompts: that of each example; log: file for a line of each step; validation: chooses the
    weights that are kept, None keeps the last; steps_before: steps of the run before the first of
    these.
    """

    name: str
    objective: Objective[E]
    examples: Sequence[E]
    prompts: Sequence[str]
    steps: int
    log: Path
    validation: Validation[E] | None = None
    steps_before: int = 0


@dataclass
class TrainingState:
    """What a checkpoint holds of a stage."""

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    validation: Validation[Any] | None

    def save(self, step: int) -> dict[str, Any]:
        """The state after a step, as tensors and plain values.

        Of a shared model every process takes part, and the first has the state.
        """
        return {
            "step": step,
            "weights": {
                name: whole_of(value.detach()) for name, value in trainable(self.model).items()
            },
            "optimizer": self._optimizer_state(),
            "scheduler": self.scheduler.state_dict(),
            "validation": None if self.validation is None else self.validation.state(),
        }

    @torch.no_grad()
    def load(self, saved: dict[str, Any]) -> int:
        """Restore a saved state; returns the step after which it was saved."""
        for name, value in trainable(self.model).items():
            value.copy_(part_of(saved["weights"][name], value))
        self._load_optimizer(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.validation is not None:
            self.validation.load(saved["validation"])
        step: int = saved["step"]
        return step

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        of_weights = {
            number: {name: whole_of(value) for name, value in of_weight.items()}
            for number, of_weight in state["state"].items()
        }
        return state | {"state": of_weights}

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        weights = [*trainable(self.model).values()]
        of_weights = {
            number: {
                name: part_of(value, weights[number])
                if value.shape == weights[number].shape
                else value
                for name, value in of_weight.items()
            }
            for number, of_weight in saved["state"].items()
        }
        self.optimizer.load_state_dict(saved | {"state": of_weights})


@dataclass(frozen=True)
class TrainLoop:
    """How every stage of one run trains.

    batch_size: examples of a step, over all ranks; schedule: shape in which the learning rate falls
    after warm-up; save_steps: steps between checkpoints, 0 for one after SIGTERM alone, None for as
    many as the steps of a stage ask for; budget: of each forward pass.
    """

    optimisation: Optimisation
    batch_size: int
    schedule: Literal["linear", "cosine"]
    seed: int
    save_steps: int | None
    ranks: Ranks
    budget: PassBudget
    checkpoints: Checkpoints

    def steps_of_epoch(self, examples: int) -> int:
        """Optimiser steps in one pass over so many examples."""
        return -(-examples // self.batch_size)

    def steps(self, examples: int, epochs: float) -> int:
        """Optimiser steps in so many passes; `max_steps` where it is given."""
        return annotator_steps(
            examples,
            batch_size=self.batch_size,
            epochs=epochs,
            max_steps=self.optimisation.max_steps,
        )

    def run(self, stage: Stage[E]) -> None:
        """Train the stage, from its start or from its checkpoint; the best weights are kept.

        Exits: STOPPED after a checkpoint, where SIGTERM came.
        """
        validation = stage.validation
        state = self._start(stage)
        saved = self.checkpoints.resumed_state(stage.name)
        done = 0 if saved is None else state.load(saved)
        state.model.train()
        save_every = steps_between_checkpoints(self.save_steps, stage.steps)
        log = TrainingLog(stage.log, stage.name, after=done) if process.is_main() else None
        with log or nullcontext(), Termination() as termination:
            if log is not None:
                log.start(stage.steps)
            for step, batch in self._batches(stage, after=done):
                if validation is not None and validation.is_over:
                    break
                # Dropout depends on the step alone, so that a resumed run draws what it would have.
                seed_of_step = self.seed * stage.steps + step
                seed = seed_of_step * self.ranks.size + self.ranks.rank
                figures = self._step(stage.objective, batch, state, seed)
                if validation is not None and validation.is_due(step, stage.steps):
                    figures |= validation.check(step, self.ranks, self.budget)
                if log is not None:
                    log.step(step=step, **figures)
                asked = self.ranks.any_rank(termination.asked and step < stage.steps)
                if asked or (save_every and step % save_every == 0):
                    number = stage.steps_before + step
                    self.checkpoints.save(stage.name, number, state.save(step))
                if asked:
                    leave_stopped(step, is_main=process.is_main())
        if validation is not None:
            validation.restore_best()

    def _start(self, stage: Stage[E]) -> TrainingState:
        model = stage.objective.model
        optimizer = torch.optim.AdamW(
            [*trainable(model).values()],
            lr=self.optimisation.learning_rate,
            weight_decay=self.optimisation.weight_decay,
            fused=True,
        )
        scheduler = get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=warmup_steps(self.optimisation.warmup_steps, stage.steps),
            num_training_steps=stage.steps,
        )
        return TrainingState(model, optimizer, scheduler, stage.validation)

    def _batches(self, stage: Stage[E], *, after: int) -> Iterator[tuple[int, list[E]]]:
        """The batches of the steps after `after`, of one shuffled pass after the other.

        Each pass shuffles the prompts. The examples of a prompt stay together, and so are read
        together, and mostly in one step (InstructGPT, Ouyang et al. 2022, section 3.5).
        """
        of_prompt: dict[str, list[E]] = {}
        for prompt, example in zip(stage.prompts, stage.examples, strict=True):
            of_prompt.setdefault(prompt, []).append(example)
        generator = random.Random(self.seed)  # noqa: S311
        size = self.batch_size
        order: list[E] = []
        for step in range(1, stage.steps + 1):
            if not order:
                shuffled = [*of_prompt.values()]
                generator.shuffle(shuffled)
                order = [*chain(*shuffled)]
            if step > after:
                yield step, order[:size]
            del order[:size]

    def _step(
        self, objective: Objective[E], batch: Sequence[E], state: TrainingState, seed: int
    ) -> dict[str, float]:
        """An optimiser step on the mean loss of the batch; its figures, means over the batch."""

        def compute() -> Tensor:
            torch.manual_seed(seed)
            # Those of passes before one that ran out of memory.
            state.optimizer.zero_grad()
            return self._gradients(objective, batch)

        longest = most_tokens(self.ranks.share(batch))
        sums = self.budget.fit(compute, longest=longest)
        self.ranks.sum_gradients(state.model)
        totals = self.ranks.total(*sums.tolist())
        # Without a limit it is still measured.
        limit = self.optimisation.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        lr = state.scheduler.get_last_lr()[0]
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad()
        means = {
            name: total / len(batch) for name, total in zip(objective.figures, totals, strict=True)
        }
        return {"lr": lr, "grad_norm": norm.item(), **means}

    def _gradients(self, objective: Objective[E], batch: Sequence[E]) -> Tensor:
        """Add the gradients of this process's share of the mean loss to those of the parameters.

        Returns: the sum of each figure over its examples, shape (figures,).
        """
        # Read once all is under way: each look at a number waits for the device.
        sums = torch.zeros(len(objective.figures), device=self.ranks.device)
        for values, counts in self.ranks.read(batch, objective.passes):
            (values[0].sum() * counts / len(batch)).backward()  # type: ignore[no-untyped-call]
            sums += values.detach().sum(dim=1) * counts
        return sums
