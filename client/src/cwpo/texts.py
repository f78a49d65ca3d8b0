"""What is done with texts before they go to a model: checks, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import filterfalse

from cwpo.types import ItemError, Prompt


def prompt_order(prompts: Sequence[Prompt]) -> list[int]:
    """The places of the prompts, equal ones side by side, a dialogue before what continues it."""
    texts = [
        (prompt,) if isinstance(prompt, str) else tuple(turn.content for turn in prompt)
        for prompt in prompts
    ]
    return sorted(range(len(prompts)), key=texts.__getitem__)


def text_problem(prompt: Prompt, **responses: str) -> ItemError | None:
    """The problem with the texts, if there is one: an empty response, or invalid Unicode.

    The names of the keyword arguments are used in the error message.
    """
    if isinstance(prompt, str) and all(map(str.strip, responses.values())):
        # Nearly every text is sound: one test of all that belongs together is three times as fast.
        try:
            "".join((prompt, *responses.values())).encode()
        except UnicodeEncodeError:
            pass
        else:
            return None
    prompts = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    for name, text in [*(("prompt", text) for text in prompts), *responses.items()]:
        try:
            # Also what a request's JSON would be encoded as.
            text.encode()
        except UnicodeEncodeError:
            return ItemError(
                code="invalid_text",
                detail=f"{name} contains half of a surrogate pair, which is not valid Unicode",
            )
    for name, response in responses.items():
        if not response or response.isspace():
            return ItemError(code="empty_response", detail=f"{name} is empty")
    return None


def responses_problem(prompt: Prompt, responses: Sequence[str]) -> ItemError | None:
    """The text_problem of a prompt and a list of responses, named by their places."""
    return text_problem(prompt, **{f"responses[{at}]": text for at, text in enumerate(responses)})


def text_problems(
    prompts: Sequence[Prompt], **responses: Sequence[str]
) -> Sequence[ItemError | None]:
    """The text_problem of each row, computed many times faster if no row has a problem."""
    if _are_sound(prompts, *responses.values()):
        return [None] * len(prompts)
    rows = zip(prompts, *responses.values(), strict=True)
    return [
        text_problem(prompt, **dict(zip(responses, texts, strict=True))) for prompt, *texts in rows
    ]


def _are_sound(prompts: Sequence[Prompt], *responses: Sequence[str]) -> bool:
    texts = [
        prompt if isinstance(prompt, str) else "".join([turn.content for turn in prompt])
        for prompt in prompts
    ]
    for column in responses:
        if not all(map(str.strip, column)):
            return False
        texts += column
    try:
        # Joining them would ask the system for as much memory again as the texts have.
        for text in filterfalse(str.isascii, texts):
            text.encode()
    except UnicodeEncodeError:
        return False
    return True
