"""What the contestants in training learn from, and what they start from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice
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

LONGEST = {"hh_harmless": 512, "qa_feedback": 1024}
"""Tokens of the longest text that is trained on, of each data set."""


def triplets(dataset: str) -> list[Triplet]:
    """The pairs of a data set in the order of the file, a the preferred response."""
    found = []
    for row in preferences(dataset):
        good, bad = row["response_a"], row["response_b"]
        if row["preferred"] == "b":
            good, bad = bad, good
        found.append(Triplet(prompt=row["prompt"], response_a=good, response_b=bad))
    return found


def shuffled(dataset: str) -> list[Triplet]:
    """In random order, the same every time, as CW-DPO trains them."""
    found = triplets(dataset)
    random.Random(0).shuffle(found)
    return found


def by_prompt(dataset: str) -> list[Triplet]:
    """All pairs of a prompt one after the other, as annotators are trained.

    The prompts stand in the order of the file, each where its first pair does.
    """
    of_prompt: dict[str, list[Triplet]] = {}
    for triplet in triplets(dataset):
        of_prompt.setdefault(str(triplet.prompt), []).append(triplet)
    return [*chain(*of_prompt.values())]


def lengths(encoder: Encoder, ordered: Iterable[Triplet]) -> Iterator[tuple[int, EncodedPair]]:
    """The pairs, each with the tokens of its longer text."""
    for triplet in ordered:
        (pair,) = encoder.encode_pairs([triplet])
        if isinstance(pair, EncodedPair):
            yield max(len(pair.a), len(pair.b)), pair


def batches(
    encoder: Encoder, ordered: Iterable[Triplet], *, count: int, size: int, longest: int
) -> list[list[EncodedPair]]:
    """The first batches of pairs of at most `longest` tokens a text; pairs that run out come again.

    As in training, a prompt whose pairs do not all fit into a batch goes on in the next one.
    """
    fitting = (pair for length, pair in lengths(encoder, ordered) if length <= longest)
    found = [*islice(fitting, count * size)]
    if not found:
        sys.exit(f"no pair has at most {longest} tokens")
    pairs = cycle(found)
    return [[*islice(pairs, size)] for _ in range(count)]


def of_length(encoder: Encoder, count: int, length: int) -> list[EncodedPair]:
    """Pairs whose longer text has that many tokens, give or take a fifth."""
    found = lengths(encoder, triplets("hh_harmless"))
    return list(islice((pair for tokens, pair in found if abs(tokens / length - 1) < 0.2), count))


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
