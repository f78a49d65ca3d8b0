"""An annotator's folder tells which conversations it has seen labels of."""

from __future__ import annotations

import pytest

from cwpo.errors import DatasetError
from cwpo.types import Message
from cwpo_trainer.data.labelled import LabelledPair
from cwpo_trainer.data.labelled_prompts import LabelledPrompts, check_unseen, labelled_prompts
from cwpo_trainer.data.splits import split


def transcript(*turns):
    speakers = ("\n\nHuman: ", "\n\nAssistant: ")
    return "".join(speakers[at % 2] + turn for at, turn in enumerate(turns)) + "\n\nAssistant:"


def messages(*turns):
    roles = ("user", "assistant")
    system = Message(role="system", content="Be brief.")
    return [system, *(Message(role=roles[at % 2], content=turn) for at, turn in enumerate(turns))]


def pair(prompt, number=0):
    return LabelledPair(str(number), prompt, "good", "bad")


@pytest.mark.parametrize("form", [transcript, messages])
def test_a_conversation_is_known_from_any_of_its_turns(form):
    seen = LabelledPrompts.of([pair(form("hello", "hi", "how"))])
    assert seen.share_a_conversation(form("hello", "hi", "how"))
    assert seen.share_a_conversation(form("hello"))
    assert seen.share_a_conversation(form("hello", "hi", "how", "so", "thanks"))
    assert not seen.share_a_conversation(form("hello there"))
    # Another conversation that begins alike, as `split` sees it too.
    assert not seen.share_a_conversation(form("hello", "hi", "where"))


def test_text_counts_as_a_whole():
    seen = LabelledPrompts.of([pair("Why?"), pair(transcript("so") + "\n")])
    assert seen.share_a_conversation("Why?")
    assert not seen.share_a_conversation("Why? Why?")
    assert seen.share_a_conversation(transcript("so"))
    assert not seen.share_a_conversation([Message(role="user", content="Why?")])


@pytest.mark.parametrize("form", [transcript, messages])
def test_what_the_split_holds_out_is_unseen(form):
    pairs = [
        pair(form(*(f"{number % 40} turn {at}" for at in range(2 * (number // 40) + 1))), number)
        for number in range(120)
    ]
    parts = split(pairs, labelled_fraction=0.5, held_out_fraction=0.2, seed=0)
    seen = LabelledPrompts.of(parts.labelled)
    assert not any(seen.share_a_conversation(item.prompt) for item in parts.held_out)
    assert not any(seen.share_a_conversation(item.prompt) for item in parts.unlabelled)
    assert all(seen.share_a_conversation(item.prompt) for item in parts.labelled)


def test_the_file_keeps_hashes_only_and_is_the_same_each_time(tmp_path):
    pairs = [pair(transcript(f"secret {number}", "a", "b")) for number in range(9)]
    LabelledPrompts.of(pairs).write(tmp_path)
    text = (tmp_path / "labelled_prompts.json").read_text()
    assert "secret" not in text
    LabelledPrompts.of(pairs[::-1]).write(tmp_path)
    assert (tmp_path / "labelled_prompts.json").read_text() == text
    assert labelled_prompts(tmp_path) == LabelledPrompts.of(pairs)


def test_a_folder_without_the_file_does_not_tell(tmp_path):
    assert labelled_prompts(tmp_path) is None
    (tmp_path / "labelled_prompts.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"labelled_prompts\.json: prompts"):
        labelled_prompts(tmp_path)


def test_known_pairs_are_refused_by_name():
    seen = LabelledPrompts.of([pair("one"), pair("two")])
    check_unseen([pair("three")], seen, "file.jsonl")
    with pytest.raises(DatasetError, match=r"file\.jsonl: 1 of 2 pairs .* the id '8'"):
        check_unseen([pair("three", 7), pair("two", 8)], seen, "file.jsonl")
