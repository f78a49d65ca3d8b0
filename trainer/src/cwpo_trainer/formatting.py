"""How the strong model reads a prompt and a response: in SFT, alignment and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cwpo.types import Prompt
from cwpo_trainer import transcript

JOIN = "\n\n"


@dataclass(frozen=True, slots=True)
class TokenisedText:
    """Token ids of a prompt, and those of the response that continue it."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def tokens(self) -> int:
        """Length of both together."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The text up to where the response starts, and the text with the response."""

    opening: str
    whole: str
    is_templated: bool


class Formatter:
    """Lays out prompts and responses for one tokenizer.

    A chat prompt, or a text prompt as its only user message, goes through the tokenizer's chat
    template. A Human/Assistant transcript stays the plain text that it is. Without a template, chat
    becomes a transcript, and text is followed by a blank line and the response. Plain text ends
    with EOS; a template ends its turns itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def tokenise(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[TokenisedText]:
        """Token ids of each prompt with its response.

        The response starts where prompt alone and prompt with response part ways, as in TRL.
        """
        layouts = [self._layout(*pair) for pair in zip(prompts, responses, strict=True)]
        openings = self._ids([(layout.opening, layout.is_templated) for layout in layouts])
        wholes = self._ids([(layout.whole, layout.is_templated) for layout in layouts])
        result = []
        for opening, whole in zip(openings, wholes, strict=True):
            start = _common_prefix(opening, whole)
            result.append(TokenisedText(whole[:start], whole[start:]))
        return result

    def opening_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt, ready for the model to continue with its answer."""
        layouts = [self._layout(prompt, "") for prompt in prompts]
        return self._ids([(layout.opening, layout.is_templated) for layout in layouts])

    def answer(self, prompt: Prompt, text: str) -> str:
        """A generated text as the response to its prompt, in the form that training data has."""
        if not self._is_transcript(prompt):
            return text.strip()
        return " " + text.split(transcript.HUMAN, maxsplit=1)[0].strip()

    def _is_transcript(self, prompt: Prompt) -> bool:
        if isinstance(prompt, str):
            return transcript.is_transcript(prompt)
        return self.tokenizer.chat_template is None

    def _layout(self, prompt: Prompt, response: str) -> _Layout:
        if self._is_transcript(prompt):
            text = prompt if isinstance(prompt, str) else transcript.write(prompt)
            opening = text.rstrip()
            return self._plain(opening, f"{opening} {response.lstrip()}")
        if self.tokenizer.chat_template is not None:
            return self._chat(prompt, response)
        text = str(prompt)
        opening = text if text[-1:].isspace() else text + JOIN
        return self._plain(opening, opening + response)

    def _plain(self, opening: str, whole: str) -> _Layout:
        return _Layout(opening, whole + str(self.tokenizer.eos_token), is_templated=False)

    def _chat(self, prompt: Prompt, response: str) -> _Layout:
        if isinstance(prompt, str):
            turns = [{"role": "user", "content": prompt}]
        else:
            turns = [message.model_dump() for message in prompt]
        render = self.tokenizer.apply_chat_template
        answer = {"role": "assistant", "content": response}
        return _Layout(
            opening=str(render(turns, tokenize=False, add_generation_prompt=True)),
            whole=str(render([*turns, answer], tokenize=False)),
            is_templated=True,
        )

    def _ids(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in texts]
        for is_templated in (False, True):
            # A chat template writes the special tokens itself.
            places = [at for at, (_, templated) in enumerate(texts) if templated == is_templated]
            if not places:
                continue
            encoded = self.tokenizer(
                [texts[at][0] for at in places], add_special_tokens=not is_templated
            )
            for at, ids in zip(places, encoded["input_ids"], strict=True):
                result[at] = ids
        return result


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return at
    return min(len(left), len(right))
