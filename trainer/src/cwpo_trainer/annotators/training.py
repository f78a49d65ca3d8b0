"""The training loop that all objectives share."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import get_scheduler

from cwpo_annotator.backends.base import EncodedPair
from cwpo_trainer import runtime
from cwpo_trainer.annotators.checkpoints import Checkpoints
from cwpo_trainer.annotators.ranks import Ranks
from cwpo_trainer.annotators.scorer import PairScorer
from cwpo_trainer.annotators.validation import Validation, trained
from cwpo_trainer.interruption import EXIT_CODE, Termination
from cwpo_trainer.training_log import TrainingLog

if TYPE_CHECKING:
    from cwpo_trainer.commands import TrainAnnotator

MAX_GRAD_NORM = 1.0

# From the scores of a and b, shape (n, 2), a the preferred one, to losses, shape (n,).
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """One run of the command: how it trains, where its files go, and who takes part."""

    settings: TrainAnnotator
    folder: Path
    ranks: Ranks
    checkpoints: Checkpoints


@dataclass(frozen=True)
class Stage:
    """What is trained, on which pairs and for how long; SFT and DPO are two stages of one run.

    log: the file of its steps; before: steps of the run that came before its first.
    """

    name: str
    scorer: PairScorer
    loss: Loss
    pairs: Sequence[EncodedPair]
    validation: Validation
    epochs: float
    log: Path
    before: int = 0


def steps_of(settings: TrainAnnotator, pairs: int, epochs: float) -> int:
    """Optimiser steps over so many pairs."""
    return settings.max_steps or max(1, round(epochs * -(-pairs // settings.batch_size)))


def train(stage: Stage, run: Run) -> None:
    """Train with AdamW, a random batch of pairs at a time; the best weights are kept.

    Goes on from a checkpoint of the stage, where there is one.
    Exits: EXIT_CODE after a checkpoint, where SIGTERM came.
    """
    settings, ranks = run.settings, run.ranks
    scorer, model, validation = stage.scorer, stage.scorer.model, stage.validation
    steps = steps_of(settings, len(stage.pairs), stage.epochs)
    optimizer, scheduler = _optimizer(model, settings, steps)
    done = _resume(run.checkpoints.take(stage.name), model, optimizer, scheduler, validation)
    check_every = settings.validate_every or -(-len(stage.pairs) // settings.batch_size)
    model.train()

    log = TrainingLog(stage.log, stage.name, after=done) if runtime.is_main() else None
    with log or nullcontext(), Termination() as termination:
        if log is not None:
            log.start(steps)
        batches = enumerate(_batches(stage.pairs, settings.batch_size, steps, settings.seed), 1)
        for step, batch in batches:
            if step <= done or validation.is_over:
                continue
            # Dropout depends on the step alone, so that a resumed run draws what it would have.
            torch.manual_seed((settings.seed * steps + step) * ranks.size + ranks.rank)
            figures = _backward(scorer, stage.loss, batch, ranks)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if validation.pairs and (step % check_every == 0 or step == steps):
                margins = ranks.gather(scorer.measure(ranks.share(validation.pairs)))
                figures |= validation.check(step, margins, model)
            if log is not None:
                log.step(step=step, lr=lr, grad_norm=norm.item(), **figures)
            (asked,) = ranks.total(termination.asked and step < steps)
            if asked or (settings.save_steps and step % settings.save_steps == 0):
                state = _state(step, model, optimizer, scheduler, validation)
                run.checkpoints.save(stage.name, stage.before + step, state)
            if asked:
                if log is not None:
                    print(
                        f"stopped by SIGTERM after step {step}: go on with --resume",
                        file=sys.stderr,
                    )
                raise SystemExit(EXIT_CODE)
    validation.restore(model)


def _optimizer(model: Any, settings: TrainAnnotator, steps: int) -> tuple[Any, Any]:
    """AdamW and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=min(settings.warmup_steps, steps // 10),
        num_training_steps=steps,
    )
    return optimizer, scheduler


def _state(
    step: int, model: Any, optimizer: Any, scheduler: Any, validation: Validation
) -> dict[str, Any]:
    return {
        "step": step,
        "weights": {name: value.detach() for name, value in trained(model).items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "validation": validation.state(),
    }


@torch.no_grad()
def _resume(
    state: dict[str, Any] | None,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    validation: Validation,
) -> int:
    """Put everything into the state; the steps that it has behind it."""
    if state is None:
        return 0
    for name, value in trained(model).items():
        value.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    validation.load(state["validation"])
    step: int = state["step"]
    return step


def _backward(
    scorer: PairScorer, loss: Loss, batch: Sequence[EncodedPair], ranks: Ranks
) -> dict[str, float]:
    """Gradients of the mean loss over the batch; the loss and the share of pairs told right."""
    # Read once all is under way: each look at a number waits for the device.
    figures = torch.zeros(2, device=ranks.device)
    for scores in scorer.scores(ranks.share(batch)):
        part = loss(scores).sum() / len(batch)
        part.backward()  # type: ignore[no-untyped-call]
        correct = (scores[:, 0] > scores[:, 1]).sum()
        figures += torch.stack([part.detach(), correct])
    ranks.add_gradients(scorer.model)
    total, correct_of_all = ranks.total(*figures.tolist())
    return {"loss": total, "accuracy": correct_of_all / len(batch)}


def _batches(
    pairs: Sequence[EncodedPair], size: int, count: int, seed: int
) -> Iterator[list[EncodedPair]]:
    """`count` batches, from one shuffled pass over the pairs after the other."""
    generator = random.Random(seed)  # noqa: S311
    order: list[EncodedPair] = []
    for _ in range(count):
        if not order:
            order = list(pairs)
            generator.shuffle(order)
        yield order[:size]
        del order[:size]
