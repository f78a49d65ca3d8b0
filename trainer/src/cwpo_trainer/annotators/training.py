"""The training loop that all objectives share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import get_scheduler

from cwpo_annotator.backends.base import EncodedPair
from cwpo_trainer.annotators.scorer import PairScorer
from cwpo_trainer.annotators.validation import Validation
from cwpo_trainer.training_log import TrainingLog

if TYPE_CHECKING:
    from cwpo_trainer.commands import TrainAnnotator

MAX_GRAD_NORM = 1.0

# From the scores of a and b, shape (n, 2), a the preferred one, to losses, shape (n,).
Loss = Callable[[Tensor], Tensor]


def train(
    scorer: PairScorer,
    loss: Loss,
    pairs: Sequence[EncodedPair],
    validation: Validation,
    settings: TrainAnnotator,
    log: TrainingLog,
    *,
    epochs: float,
) -> None:
    """Train with AdamW, a random batch of pairs at a time; the best weights are kept."""
    model = scorer.model
    steps_an_epoch = -(-len(pairs) // settings.batch_size)
    steps = settings.max_steps or max(1, round(epochs * steps_an_epoch))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    scheduler = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=min(settings.warmup_steps, steps // 10),
        num_training_steps=steps,
    )
    check_every = settings.validate_every or steps_an_epoch
    model.train()
    log.start(steps)
    for step, batch in enumerate(_batches(pairs, settings.batch_size, steps, settings.seed), 1):
        figures = _backward(scorer, loss, batch)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if validation.pairs and (step % check_every == 0 or step == steps):
            figures |= validation.check(step, scorer.measure(validation.pairs), model)
        log.step(step=step, lr=lr, grad_norm=norm.item(), **figures)
        if validation.is_over:
            break
    validation.restore(model)


def _backward(scorer: PairScorer, loss: Loss, batch: Sequence[EncodedPair]) -> dict[str, float]:
    """Gradients of the mean loss over the batch; the loss and the share of pairs told right."""
    total = 0.0
    correct = 0
    for scores in scorer.scores(batch):
        part = loss(scores).sum() / len(batch)
        part.backward()  # type: ignore[no-untyped-call]
        total += part.item()
        correct += int((scores[:, 0] > scores[:, 1]).sum())
    return {"loss": total, "accuracy": correct / len(batch)}


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
