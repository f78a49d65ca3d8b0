"""How reward models from elsewhere read a prompt and a response.

A model scores texts in another form than it was trained on as readily as in the right one, and
wrongly. Of models that come without annotator.json, the chat template tells the form; for those
without one, it is known here by the class of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cwpo.types import Message, Prompt
from cwpo_annotator.checkpoint import COMPARER, CheckpointError, ReadingName
from cwpo_annotator.encoding import transcript
from cwpo_annotator.encoding.joining import JoinedText, join_chat


@dataclass(frozen=True, slots=True)
class Reading:
    """A form of texts.

    join: makes one text of a prompt and a response; words: says how, for users.
    """

    join: Callable[[PreTrainedTokenizerBase, Prompt, str], JoinedText]
    words: str


def _by_template(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> JoinedText:
    if not isinstance(prompt, str):
        return join_chat(tokenizer, prompt, response)
    if transcript.is_transcript(prompt):
        return join_chat(tokenizer, transcript.read(prompt), response.strip())
    return join_chat(tokenizer, [Message(role="user", content=prompt)], response)


def _as_pair(_: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> JoinedText:
    first = _plain(prompt)
    return JoinedText(first + response.strip(), first, len(first), len(first), is_pair=True)


def _as_steamshp(_: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> JoinedText:
    post, answer = (text.strip().replace("\n", " ") for text in (_plain(prompt), response))
    start = len("POST: ")
    opening = f"POST: {post} \n\n RESPONSE A: "
    return JoinedText(
        f"{opening}{answer}\n\n RESPONSE B: .\n\n Which response is better? RESPONSE",
        opening,
        start + len(post),
        len(opening),
        prompt_start=start,
    )


def _plain(prompt: Prompt) -> str:
    """A prompt for models that know no turns: a question remains itself, a dialogue is written."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].content
    return transcript.write(prompt)


READINGS: dict[ReadingName, Reading] = {
    "chat_template": Reading(
        _by_template,
        "the tokenizer's chat template and nothing added to it, with a text prompt as the only "
        "user message and a Human/Assistant transcript as messages",
    ),
    "text_pair": Reading(
        _as_pair, "prompt and response as the first and the second text of the tokenizer"
    ),
    "steamshp": Reading(
        _as_steamshp,
        '"POST: (prompt) RESPONSE A: (response) RESPONSE B: . Which response is better? RESPONSE", '
        "scored by the log-odds of the answer A",
    ),
}

# As the cards of the models say.
_OF_ARCHITECTURE: dict[str, ReadingName] = {
    # OpenAssistant/reward-model-deberta-v3-large-v2
    "DebertaV2ForSequenceClassification": "text_pair",
    # stanfordnlp/SteamSHP-flan-t5-large and -xl
    COMPARER: "steamshp",
}


def reading_of(
    architectures: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> ReadingName | None:
    """The reading of a model without annotator.json; None where neither table nor tokenizer tells.

    Args:
        architectures: as config.json names them.
    """
    if tokenizer.chat_template is not None:
        return "chat_template"
    known = (_OF_ARCHITECTURE[name] for name in architectures if name in _OF_ARCHITECTURE)
    return next(known, None)


def option_a(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which SteamSHP answers that response A is better.

    Raises: CheckpointError if the tokenizer has no such token.
    """
    ids = tokenizer("A", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise CheckpointError("the tokenizer has no single token for A, the answer of SteamSHP")
    return int(ids[0])
