"""How the strong model reads a prompt and a response: in SFT, alignment and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cwpo.types import Message, Prompt
from cwpo_annotator.encoding import tokenisation, transcript
from cwpo_annotator.encoding.joining import (
    BLANK_LINE,
    JoinedText,
    join_chat,
    join_text,
    join_transcript,
    open_chat,
)
from cwpo_trainer.policy.end_of_turn import end_of_turn

# Of a conversation: role and content of each turn.
_Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TokenisedText:
    """Token ids of a prompt, and those of the response that continue it."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def tokens(self) -> int:
        """Length of both together."""
        return len(self.prompt_ids) + len(self.response_ids)


class Formatter:
    """Joins prompts and responses for one tokenizer.

    A chat prompt, or a text prompt as its only user message, goes through the tokenizer's chat
    template. A Human/Assistant transcript stays the plain text that it is. Without a template, chat
    becomes a transcript, and text is followed by a blank line and the response. A template ends its
    turns with a special token; plain text, and what a template without one writes, ends with EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._template_ends_turns = end_of_turn(tokenizer) is not None
        self._separators = tokenisation.separators(tokenizer)

    def tokenise(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[TokenisedText]:
        """Token ids of each prompt with its response.

        The response starts where prompt alone and prompt with response part ways, as in TRL.
        """
        openings: dict[_Key, str] = {}
        texts = [self._ended(*pair, openings) for pair in zip(prompts, responses, strict=True)]
        result = []
        for opening, whole in tokenisation.opening_and_whole_ids(
            self.tokenizer, texts, self._separators
        ):
            start = tokenisation.response_start_after(opening, whole)
            result.append(TokenisedText(whole[:start], whole[start:]))
        return result

    def opening_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt, ready for the model to continue with its answer."""
        texts = [self._join(prompt, "", {}) for prompt in prompts]
        return tokenisation.opening_ids(self.tokenizer, texts)

    def answer(self, prompt: Prompt, text: str) -> str:
        """A generated text as the response to its prompt, in the form that training data has."""
        return transcript.first_turn(text) if self._is_transcript(prompt) else text.strip()

    def _is_transcript(self, prompt: Prompt) -> bool:
        if isinstance(prompt, str):
            return transcript.is_transcript(prompt)
        return self.tokenizer.chat_template is None

    def _join(self, prompt: Prompt, response: str, openings: dict[_Key, str]) -> JoinedText:
        """Both as one text.

        Args:
            openings: of the prompts that a template has written so far, to which this one is added.
        """
        has_template = self.tokenizer.chat_template is not None
        if isinstance(prompt, str):
            if transcript.is_transcript(prompt):
                return join_transcript(prompt.rstrip(), response)
            if not has_template:
                # Other than an annotator's, it may not depend on the response, which is yet to be
                # written.
                return join_text(prompt, response, "" if prompt[-1:].isspace() else BLANK_LINE)
            turns = [Message(role="user", content=prompt)]
        else:
            turns = [*prompt]
        key = tuple((turn.role, turn.content) for turn in turns)
        if has_template and key not in openings:
            openings[key] = open_chat(self.tokenizer, turns)
        return join_chat(self.tokenizer, turns, response, openings.get(key))

    def _ended(self, prompt: Prompt, response: str, openings: dict[_Key, str]) -> JoinedText:
        text = self._join(prompt, response, openings)
        if text.is_templated and self._template_ends_turns:
            return text
        return text.followed_by(str(self.tokenizer.eos_token))
