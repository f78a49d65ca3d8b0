"""How a prompt and a response become one text: as plain text, as a transcript, by a template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from cwpo.types import Message
from cwpo_annotator.encoding import transcript
from cwpo_annotator.encoding.prefix import common_prefix

# Stands between a text prompt and its response, unless a checkpoint says otherwise.
BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class JoinedText:
    """A prompt with a response, to tokenise whole.

    Args:
        text: both.
        opening: what a model is given to answer the prompt; nearly always the text's beginning,
            but some templates open an answer otherwise than they write a finished one.
        prompt_end: the character of the text that the prompt ends before.
        response_start: the character of the text that the response starts at.
        is_templated: whether a chat template wrote the text, and in it the special tokens.
        is_cut: whether the prompt has lost its oldest characters.
        prompt_start: the character of the text that the prompt starts at.
        is_pair: whether the tokenizer is given prompt and response as two texts, which it joins.
    """

    text: str
    opening: str
    prompt_end: int
    response_start: int
    is_templated: bool = False
    is_cut: bool = False
    prompt_start: int = 0
    is_pair: bool = False

    def followed_by(self, end: str) -> JoinedText:
        """The same with more at its end."""
        return replace(self, text=self.text + end)

    def stripped(self) -> JoinedText:
        """The same without white space at its end."""
        text = self.text.rstrip()
        start, end = min(self.response_start, len(text)), min(self.prompt_end, len(text))
        return JoinedText(text, self.opening, end, start, self.is_templated, self.is_cut)

    def without_oldest(self, characters: int) -> JoinedText:
        """The same without so many characters of its prompt, the oldest."""
        start, kept = self.prompt_start, self.prompt_start + characters
        return replace(
            self,
            text=self.text[:start] + self.text[kept:],
            opening=self.opening[:start] + self.opening[kept:],
            prompt_end=self.prompt_end - characters,
            response_start=self.response_start - characters,
            is_cut=True,
        )


def join_text(prompt: str, response: str, join: str) -> JoinedText:
    """A text prompt, `join`, and the response."""
    opening = prompt + join
    return JoinedText(opening + response, opening, len(prompt), len(opening))


def join_transcript(prompt: str, response: str) -> JoinedText:
    """A transcript that ends in "Assistant:", and the response after one space."""
    return join_text(prompt, " " + response.lstrip(), "")


def join_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    response: str,
    opening: str | None = None,
) -> JoinedText:
    """Chat messages and the response by the tokenizer's chat template; without one, a transcript.

    Args:
        opening: what `open_chat` gives for this prompt, if it is known.
    Raises: whatever the template does, which may refuse a conversation.
    """
    if tokenizer.chat_template is None:
        return join_transcript(transcript.write(prompt), response)
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    answer = {"role": "assistant", "content": response}
    text = str(tokenizer.apply_chat_template([*turns, answer], tokenize=False))
    if opening is None:
        opening = open_chat(tokenizer, prompt)
    start = len(opening) if text.startswith(opening) else common_prefix(text, opening)
    return JoinedText(text, opening, start, start, is_templated=True)


def open_chat(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    """Chat messages by the tokenizer's chat template, up to where an answer begins.

    Raises: whatever the template does, which may refuse a conversation.
    """
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
