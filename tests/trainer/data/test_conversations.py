"""Dialogues stay whole wherever data is divided."""

from __future__ import annotations

import random

import pytest

from cwpo.errors import DatasetError
from cwpo.types import Message
from cwpo_trainer.data.conversations import beginnings, one_of_each
from cwpo_trainer.data.labelled import LabelledPair, read_pairs
from cwpo_trainer.data.splits import split, validation_split
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import evaluation_rows


def transcript(*turns):
    """Text that waits for the assistant; turns of person and assistant in turn."""
    speakers = ("\n\nHuman: ", "\n\nAssistant: ")
    return "".join(speakers[at % 2] + turn for at, turn in enumerate(turns)) + "\n\nAssistant:"


def messages(*turns):
    roles = ("user", "assistant")
    return [Message(role=roles[at % 2], content=turn) for at, turn in enumerate(turns)]


def dialogues(form, count=60, turns=3):
    """Prompts of dialogues, each with all of its beginnings, in random order."""
    prompts = [
        form(*(f"{number} turn {at}" for at in range(2 * length + 1)))
        for number in range(count)
        for length in range(turns)
    ]
    random.Random(0).shuffle(prompts)
    return prompts


def conversation_of(pair):
    text = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0].content
    return text.removeprefix("\n\nHuman: ").split()[0]


@pytest.mark.parametrize("form", [transcript, messages])
def test_no_conversation_is_in_two_parts(form):
    pairs = [
        LabelledPair(str(at), prompt, "good", "bad") for at, prompt in enumerate(dialogues(form))
    ]
    parts = split(pairs, labelled_fraction=0.3, held_out_fraction=0.1, seed=0)
    training, validation = validation_split(parts.labelled, 0.2, seed=0)
    sets = [
        {conversation_of(pair) for pair in part}
        for part in (training, validation, parts.unlabelled, parts.held_out)
    ]
    assert all(sets)
    assert sum(map(len, sets)) == len(set.union(*sets)) == 60


@pytest.mark.parametrize("form", [transcript, messages])
def test_no_conversation_is_evaluated_on_and_trained_on(form):
    prompts = dialogues(form)
    kept = evaluation_rows(prompts, 0.3, seed=0)
    pairs = [LabelledPair(str(at), prompt, "good", "bad") for at, prompt in enumerate(prompts)]
    sides = [
        {conversation_of(pair) for pair, here in zip(pairs, kept, strict=True) if here == side}
        for side in (True, False)
    ]
    assert all(sides)
    assert not set.intersection(*sides)


def test_only_what_continues_a_prompt_is_of_its_conversation():
    first, second = transcript("hi", "Hello.", "help"), transcript("hi", "Hello.", "sing")
    prompts = [
        *(second, first, f"{first} "),
        *(transcript("hi"), transcript("hi there"), transcript("hi", "Hello.", "help", "No.", "y")),
        *("What is", "What is love"),
        *(messages("hi"), messages("hi", "Hello.", "help"), messages("hi there")),
        [Message(role="system", content="hi")],
        [Message(role="system", content="hi"), *messages("hi")],
    ]
    keys = beginnings(prompts)
    groups = {}
    for at, key in enumerate(keys):
        groups.setdefault(key, []).append(at)
    assert sorted(groups.values()) == [[0, 1, 2, 3, 5], [4], [6], [7], [8, 9], [10], [11], [12]]
    without_root = beginnings([first, second, f"{first} "])
    assert without_root[0] == without_root[2] != without_root[1]


def test_as_few_conversations_as_parts_are_too_few():
    pairs = [
        LabelledPair(str(at), prompt, "good", "bad")
        for at, prompt in enumerate(dialogues(transcript, count=1, turns=9))
    ]
    with pytest.raises(DatasetError, match=r"9 pairs \(conversations: 1\) are too few"):
        split(pairs, labelled_fraction=0.5, held_out_fraction=0.2, seed=0)


def test_human_dialogues_do_not_leak(data_dir):
    pairs = read_pairs(str(data_dir / "hh_harmless.jsonl.gz"), UnusedRows(0.01))
    parts = split(pairs, labelled_fraction=0.3, held_out_fraction=0.1, seed=0)
    of_part = {
        pair.prompt.rstrip(): number
        for number, part in enumerate((parts.labelled, parts.unlabelled, parts.held_out))
        for pair in part
    }
    continued = 0
    for prompt, number in of_part.items():
        for at in range(len(prompt)):
            if prompt.startswith("\n\nAssistant:", at):
                beginning = prompt[: at + len("\n\nAssistant:")]
                if beginning != prompt and beginning in of_part:
                    continued += 1
                    assert of_part[beginning] == number
    assert continued > 100


@pytest.mark.parametrize("form", [transcript, messages])
def test_one_prompt_of_each_conversation_is_drawn(form):
    prompts = dialogues(form)
    places = one_of_each(prompts, seed=0)
    keys = beginnings(prompts)
    assert sorted(keys[at] for at in places) == sorted(set(keys))
    assert places == one_of_each(prompts, seed=0) != one_of_each(prompts, seed=1)
    # Not always the shortest: each turn has its chance.
    assert len({len(prompts[at]) for at in places}) > 1
