"""Human/Assistant transcripts, the plain-text form of a dialogue (Anthropic's HH-RLHF).

A transcript prompt ends in "Assistant:"; its response follows after one space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from cwpo.types import Message
from cwpo_annotator.encoding.prefix import common_prefix

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_SPEAKERS = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": ""}


def is_transcript(prompt: str) -> bool:
    """Whether the prompt is a dialogue that waits for the assistant's next turn."""
    return prompt.rstrip().endswith(ASSISTANT)


def write(messages: Sequence[Message]) -> str:
    """Chat messages as a transcript prompt."""
    turns = "".join(_SPEAKERS[message.role] + message.content for message in messages)
    return turns + ASSISTANT


def read(prompt: str) -> list[Message]:
    """A transcript prompt as chat messages; what stands before its first turn is of the system."""
    before, *turns = _TURN.split(prompt)
    messages = [Message(role="system", content=before.strip())] if before.strip() else []
    # The last turn is the assistant's, and yet to be written.
    for speaker, text in zip(turns[:-2:2], turns[1:-2:2], strict=True):
        role: Literal["user", "assistant"] = "user" if speaker == "Human" else "assistant"
        messages.append(Message(role=role, content=text.strip()))
    return messages


def first_turn(generated: str) -> str:
    """The assistant's own turn of a generated text, which may go on with turns of both."""
    return " " + generated.split(HUMAN, maxsplit=1)[0].strip()


def split_last_common_turn(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Prompt, chosen and rejected response of two whole transcripts.

    The prompt is the text that both share, up to and including the last "Assistant:" in it. None
    where they share no such turn.
    """
    at = chosen.rfind(ASSISTANT, 0, common_prefix(chosen, rejected))
    if at < 0:
        return None
    end = at + len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]
