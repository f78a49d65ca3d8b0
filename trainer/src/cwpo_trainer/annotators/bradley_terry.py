"""Step (i): training a pretrained model as a Bradley-Terry annotator (eq. 5)."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, get_scheduler

from cwpo.errors import DatasetError
from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.base import EncodedPair
from cwpo_annotator.backends.torch import best_device
from cwpo_annotator.checkpoint import Card, CheckpointError, HeldOut, resolve, write_card
from cwpo_annotator.encoding import Encoder
from cwpo_trainer import data, runtime
from cwpo_trainer.annotators import calibration
from cwpo_trainer.data import LabelledPair, Split
from cwpo_trainer.evaluation import annotator as evaluation
from cwpo_trainer.record import LOG_NAME, Output, new_output
from cwpo_trainer.training_log import TrainingLog

if TYPE_CHECKING:
    from cwpo_trainer.commands import TrainAnnotator

MAX_GRAD_NORM = 1.0
# Tokens a forward pass, padding included; it sets memory and speed, not the result.
_TOKEN_BUDGETS = {"cpu": 1024, "cuda": 65536}


def run(settings: TrainAnnotator) -> None:
    """Split, train, measure on the held-out pairs and write the checkpoint folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any training.
    """
    parts = data.split(
        data.sample(data.read_pairs(settings.data), settings.max_pairs, seed=settings.seed),
        labelled_fraction=settings.labelled_fraction,
        held_out_fraction=settings.held_out_fraction,
        seed=settings.seed,
    )
    base = resolve(settings.model)
    recorded = settings.model_dump(mode="json")
    with new_output("train-annotator", settings.output, recorded) as output:
        if settings.splits is not None:
            data.write_splits(parts, settings.splits, seed=settings.seed)
        runtime.prepare(seed=settings.seed, threads=settings.threads)
        encoder = Encoder.create(base, max_length=settings.max_length)
        pairs = encode(encoder, parts.labelled, output)
        model = load(base, encoder)
        with TrainingLog(output.folder / LOG_NAME, "annotator") as log:
            train(model, encoder.pad_token_id, pairs, settings, log)
        _save(model, encoder, settings, parts, output)


def encode(encoder: Encoder, pairs: Sequence[LabelledPair], output: Output) -> list[EncodedPair]:
    """Token ids of each pair, `a` the chosen one; what was cut or left out goes into the results.

    Prompts that are too long lose their oldest tokens; pairs whose responses are too long are left
    out. Raises: DatasetError when no pair is left.
    """
    triplets = [
        Triplet(id=pair.id, prompt=pair.prompt, response_a=pair.chosen, response_b=pair.rejected)
        for pair in pairs
    ]
    encoded = encoder.encode_pairs(triplets, "prompt_left")
    kept = [item for item in encoded if isinstance(item, EncodedPair)]
    truncated = sum(item.truncated for item in kept)
    left_out = len(pairs) - len(kept)
    output.results |= {
        "pairs": len(kept),
        "pairs_too_long": left_out,
        "prompts_truncated": truncated,
    }
    if not kept:
        raise DatasetError(f"no pair fits into --max-length {encoder.max_length:,} tokens")
    if truncated or left_out:
        print(
            f"of {len(pairs):,} pairs, {truncated:,} prompts were cut to {encoder.max_length:,} "
            f"tokens and {left_out:,} pairs with longer responses left out",
            file=sys.stderr,
        )
    return kept


def load(base: Path, encoder: Encoder) -> Any:
    """The base model with a new scalar head, in float32.

    Raises: CheckpointError for one that cannot be loaded so.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{base}: cannot be given a scalar head: {reason}") from error
    if len(encoder.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(encoder.tokenizer))
    model.config.pad_token_id = encoder.pad_token_id
    return model


def train(
    model: Any,
    pad_token_id: int,
    pairs: Sequence[EncodedPair],
    settings: TrainAnnotator,
    log: TrainingLog,
) -> None:
    """Train all weights with AdamW on eq. 5, a random batch of pairs at a time."""
    device = best_device()
    steps_an_epoch = -(-len(pairs) // settings.batch_size)
    steps = settings.max_steps or max(1, round(settings.epochs * steps_an_epoch))
    model.to(device).train()
    _keep_head_in_float32(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=min(settings.warmup_steps, steps // 10),
        num_training_steps=steps,
    )
    budget = _TOKEN_BUDGETS.get(torch.device(device).type, 8192)
    use_bfloat16 = runtime.use_bfloat16(settings.dtype)
    log.start(steps)
    for step, batch in enumerate(_batches(pairs, settings.batch_size, steps, settings.seed), 1):
        loss = 0.0
        correct = 0
        for part in _parts(batch, budget):
            with torch.autocast(device, torch.bfloat16) if use_bfloat16 else nullcontext():
                margins = _margins(model, pad_token_id, part)
            part_loss = -F.logsigmoid(margins).sum() / len(batch)
            part_loss.backward()  # type: ignore[no-untyped-call]
            loss += part_loss.item()
            correct += int((margins > 0).sum())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log.step(step=step, loss=loss, lr=lr, accuracy=correct / len(batch), grad_norm=norm.item())


def _margins(model: Any, pad_token_id: int, pairs: Sequence[EncodedPair]) -> Tensor:
    """Score of a less that of b, shape (pairs,), float32, from one right-padded forward pass."""
    texts = [*(pair.a for pair in pairs), *(pair.b for pair in pairs)]
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    scores: Tensor = logits[:, 0].float()
    return scores[: len(pairs)] - scores[len(pairs) :]


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


def _parts(batch: list[EncodedPair], budget: int) -> Iterator[list[EncodedPair]]:
    """The batch in parts of like length within the token budget: little padding, same gradient."""
    part: list[EncodedPair] = []
    for pair in sorted(batch, key=_width, reverse=True):
        if part and (len(part) + 1) * 2 * _width(part[0]) > budget:
            yield part
            part = []
        part.append(pair)
    yield part


def _width(pair: EncodedPair) -> int:
    return max(len(pair.a), len(pair.b))


def _keep_head_in_float32(model: Any) -> None:
    # Under autocast a score would have eight bits, too few to tell close responses apart.
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == 1:
            head: Any = module
            head.forward = _float32(head)


def _float32(head: torch.nn.Linear) -> Any:
    def forward(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.float(), head.weight, head.bias)

    return forward


def _save(
    model: Any,
    encoder: Encoder,
    settings: TrainAnnotator,
    parts: Split,
    output: Output,
) -> None:
    """Write weights, tokenizer and card, and measure what was written on the held-out pairs."""
    model.save_pretrained(output.folder)
    encoder.save(output.folder)
    card = Card(
        base_model=settings.model,
        objective=settings.objective,
        encoding=encoder.spec,
        data_fingerprint=data.fingerprint(parts.labelled),
        labelled_pairs=len(parts.labelled),
    )
    write_card(output.folder, card)
    if parts.held_out:
        annotator = Annotator.load(output.folder)
        margins = evaluation.margins_of(annotator, parts.held_out)
        metrics = evaluation.metrics_of(margins, failed=len(parts.held_out) - len(margins))
        output.results["held_out"] = metrics.model_dump(mode="json")
        card.temperature = calibration.temperature(margins)
        output.results["temperature"] = card.temperature
        card.held_out = HeldOut(
            pairs=metrics.pairs,
            accuracy=metrics.accuracy,
            mean_confidence=metrics.mean_confidence,
        )
        card.confidence_quantiles = metrics.confidence_quantiles
        write_card(output.folder, card)
        print(f"held out: {metrics.summary}")
