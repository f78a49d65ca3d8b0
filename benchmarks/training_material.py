"""What the contestants in training learn from, and what they start from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from measurement import backbone, preferences
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cwpo import Triplet
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.responses import ResponseEncoder

LEARNING_RATE = 2e-5

# --- pairs


def triplets() -> Iterator[Triplet]:
    """The pairs of hh_harmless, a the preferred response."""
    for row in preferences("hh_harmless"):
        good, bad = row["response_a"], row["response_b"]
        if row["preferred"] == "b":
            good, bad = bad, good
        yield Triplet(prompt=row["prompt"], response_a=good, response_b=bad)


def lengths(encoder: Encoder) -> Iterator[tuple[int, EncodedPair]]:
    """The pairs, each with the tokens of its longer text."""
    for triplet in triplets():
        (pair,) = encoder.encode_pairs([triplet])
        if isinstance(pair, EncodedPair):
            yield max(len(pair.a), len(pair.b)), pair


def pairs_of(encoder: Encoder, count: int, max_length: int) -> list[EncodedPair]:
    """The first pairs of at most max_length tokens a text."""
    fitting = (pair for length, pair in lengths(encoder) if length <= max_length)
    found = list(islice(fitting, count))
    if len(found) < count:
        sys.exit(f"hh_harmless has only {len(found)} pairs of at most {max_length} tokens")
    return found


def of_length(encoder: Encoder, count: int, length: int) -> list[EncodedPair]:
    """Pairs whose longer text has that many tokens, give or take a fifth."""
    fitting = (pair for found, pair in lengths(encoder) if abs(found / length - 1) < 0.2)
    return list(islice(fitting, count))


def batches(pairs: Sequence[EncodedPair], size: int) -> list[list[EncodedPair]]:
    return [list(pairs[at : at + size]) for at in range(0, len(pairs), size)]


# --- models


def response_encoder() -> ResponseEncoder:
    encoder = ResponseEncoder.create(backbone("smollm2"))
    assert isinstance(encoder, ResponseEncoder)
    return encoder


def causal() -> Any:
    return AutoModelForCausalLM.from_pretrained(backbone("smollm2"), dtype=torch.float32)


def scalar() -> tuple[Any, Encoder]:
    """The backbone with a new head, the same every time."""
    torch.manual_seed(0)
    encoder = Encoder.create(backbone("smollm2"))
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone("smollm2"), num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = encoder.pad_token_id
    return model, encoder


def lora() -> Any:
    return LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
