"""Conversations: prompts of which one continues another."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

from cwpo.types import Prompt
from cwpo_annotator.encoding import transcript
from cwpo_trainer.data.labelled import prompt_key

_TURN_OF_ASSISTANT = re.compile(re.escape(transcript.ASSISTANT))
# Role and content of each message.
_Chat = tuple[tuple[str, str], ...]
T = TypeVar("T", str, _Chat)


def beginnings(prompts: Sequence[Prompt]) -> list[str]:
    """For each prompt, the `prompt_key` of the first one in its conversation, which it continues.

    A transcript, at whose end it is the assistant's turn, is continued by texts that begin with it,
    and a list of messages by lists that begin with it. Other texts are not continued.
    """
    turns = [_turns(prompt) for prompt in prompts]
    texts = {text for text in turns if isinstance(text, str)}
    chats = {chat for chat in turns if not isinstance(chat, str)}
    first: dict[str | _Chat, str | _Chat] = dict(
        chain(
            _first_of_each(texts, str.startswith, transcript.is_transcript),
            _first_of_each(chats, _starts_with, _has_question),
        )
    )
    keys: dict[str | _Chat, str] = {}
    for one, prompt in zip(turns, prompts, strict=True):
        keys.setdefault(one, prompt_key(prompt))
    return [keys[first[one]] for one in turns]


def one_of_each(prompts: Sequence[Prompt], *, seed: int) -> list[int]:
    """The place of one prompt of each conversation, drawn at random, in order."""
    groups: dict[str, list[int]] = {}
    for place, beginning in enumerate(beginnings(prompts)):
        groups.setdefault(beginning, []).append(place)
    draw = random.Random(seed)  # noqa: S311
    return sorted(draw.choice(places) for places in groups.values())


def conversation_key(prompt: Prompt) -> str:
    """The `prompt_key` of the prompt as conversations compare it: space after a transcript is none.

    Two prompts are of one conversation if the key of one is among the `earlier_keys` of the other,
    or the keys are the same.
    """
    if isinstance(prompt, str) and transcript.is_transcript(prompt):
        return prompt.rstrip()
    return prompt_key(prompt)


def earlier_keys(prompt: Prompt) -> list[str]:
    """The keys of all prompts that this one would continue, the shortest first."""
    if isinstance(prompt, str):
        ends = [found.end() for found in _TURN_OF_ASSISTANT.finditer(prompt.rstrip())]
        return [prompt[:end] for end in ends if end < len(prompt.rstrip())]
    shorter = (prompt[:length] for length in range(1, len(prompt)))
    return [
        prompt_key(messages)
        for messages in shorter
        if any(message.role == "user" for message in messages)
    ]


def _first_of_each(
    distinct: Iterable[T], starts_with: Callable[[T, T], bool], can_go_on: Callable[[T], bool]
) -> Iterator[tuple[T, T]]:
    """Each with what it begins with of the others, or itself: sorted, all that do so follow it."""
    beginning: T | None = None
    for one in sorted(distinct):
        if beginning is None or not starts_with(one, beginning):
            beginning = one if can_go_on(one) else None
        yield one, one if beginning is None else beginning


def _turns(prompt: Prompt) -> str | _Chat:
    if isinstance(prompt, str):
        return conversation_key(prompt)
    return tuple((message.role, message.content) for message in prompt)


def _starts_with(chat: _Chat, beginning: _Chat) -> bool:
    return chat[: len(beginning)] == beginning


def _has_question(chat: _Chat) -> bool:
    """Whether the user has said something: chats may have a system message in common."""
    return any(role == "user" for role, _ in chat)
