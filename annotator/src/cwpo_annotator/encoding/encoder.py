"""The one path from prompt and response to token ids: in training, annotation and serving."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cwpo.types import ItemError, Prompt, ScoreItem, Triplet, Truncation
from cwpo_annotator.checkpoint import CheckpointError, EncodingSpec, ReadingName, read_card
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.encoding.joining import BLANK_LINE, JoinedText, join_chat, join_text
from cwpo_annotator.encoding.readings import READINGS, reading_of
from cwpo_annotator.encoding.tokenisation import prompt_range, token_ids
from cwpo_annotator.encoding.tokenizer import (
    architectures,
    dedicated_pad,
    load_tokenizer,
    pads_with_eos,
    positions,
)

logger = logging.getLogger("cwpo_annotator")

DEFAULT_MAX_LENGTH = 1024
# The least that a limit in characters counts a token for: white space and long unknown words may
# come down to very few tokens.
_CHARACTERS_PER_TOKEN = 100


class Encoder:
    """Joins prompt and response, tokenises them together and ends them with EOS.

    A text prompt is joined to its response by `spec.join`, unless the prompt ends or the response
    begins with white space (as after transcripts that end in "Assistant:"). A chat prompt goes
    through the tokenizer's chat template, or becomes a Human/Assistant transcript if there is none.
    With `spec.reading`, texts have the form of that reading instead, and no EOS is added.
    Responses are never truncated. A text with more characters than max_length tokens can have is
    not tokenised, so that a huge text takes neither time nor memory.
    """

    compares_only = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: EncodingSpec) -> None:
        if not tokenizer.is_fast:
            raise CheckpointError("the tokenizer has no fast (tokenizers) version")
        pad = tokenizer.convert_tokens_to_ids(spec.pad_token)
        if not isinstance(pad, int) or pad == tokenizer.eos_token_id:
            raise CheckpointError(
                f"the pad token {spec.pad_token!r} is not a single token of this tokenizer"
            )
        tokenizer.pad_token = spec.pad_token
        self.tokenizer = tokenizer
        self.spec = spec
        self.pad_token_id: int = pad
        self._eos: int | None = tokenizer.eos_token_id
        longest = max(map(len, tokenizer.get_vocab()))
        self._max_characters = spec.max_length * max(longest, _CHARACTERS_PER_TOKEN)

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        max_length: int = DEFAULT_MAX_LENGTH,
        join: str = BLANK_LINE,
        eos: bool = True,
        reading: ReadingName | None = None,
    ) -> Encoder:
        """The encoder for a model that is to be trained as an annotator.

        max_length is lowered to what the model's positions and its tokenizer allow. A tokenizer
        without a dedicated pad token gets one. If that token is new, `len(tokenizer)` grows, and
        the model's embeddings must be resized.
        """
        tokenizer = load_tokenizer(folder)
        longest = min(max_length, positions(folder) or max_length, tokenizer.model_max_length)
        pad = dedicated_pad(tokenizer)
        spec = EncodingSpec(join=join, max_length=longest, pad_token=pad, eos=eos, reading=reading)
        return cls(tokenizer, spec)

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """The encoder of a checkpoint, as its annotator.json says.

        For a folder without annotator.json (a reward model from elsewhere) `reading_of` tells the
        form of its texts, the defaults of `create` apply, and the log lists them. If its config
        names EOS as the pad token, transformers reads the score at the token before EOS, so texts
        do not end in it.
        Raises: CheckpointError if tokenizer and annotator.json do not match.
        """
        card = read_card(folder)
        if card is None:
            reading = reading_of(architectures(folder), load_tokenizer(folder))
            encoder = cls.create(folder, eos=not pads_with_eos(folder), reading=reading)
            logger.warning("%s has no annotator.json; by default: %s", folder, encoder.reads)
            return encoder
        tokenizer = load_tokenizer(folder)
        available = positions(folder)
        if available is not None and card.encoding.max_length > available:
            raise CheckpointError(
                f"{folder}: annotator.json says max_length {card.encoding.max_length}, "
                f"but the model has {available} positions"
            )
        return cls(tokenizer, card.encoding)

    @property
    def reads(self) -> str:
        """What a text is made of, in words."""
        spec = self.spec
        if spec.reading is not None:
            return (
                f"{READINGS[spec.reading].words}, {'' if spec.eos else 'no EOS at the end, '}at "
                f"most {spec.max_length:,} tokens a text, pad token {spec.pad_token}"
            )
        return (
            f"at most {spec.max_length:,} tokens a text, {spec.join!r} between a text prompt and "
            f"its response, {'' if spec.eos else 'no '}EOS at the end, pad token {spec.pad_token}"
        )

    @property
    def ends_texts(self) -> bool:
        """Whether a special token ends each text: EOS, or [SEP] of BERT."""
        if self.spec.eos and self._eos is not None:
            return True
        ids = self.tokenizer("a")["input_ids"]
        return bool(ids) and ids[-1] in self.tokenizer.all_special_ids

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a text."""
        return self.spec.max_length

    def encode_pairs(
        self, triplets: Sequence[Triplet], truncation: Truncation = "error"
    ) -> list[EncodedPair | ItemError]:
        """Token ids of both texts of each triplet.

        If one text is too long and truncation is prompt_left, both lose the same oldest tokens of
        the prompt, so that both responses are compared after the same prompt.
        """
        texts: list[JoinedText | ItemError] = []
        for triplet in triplets:
            both = (triplet.response_a, triplet.response_b)
            texts += self._texts(triplet.prompt, both, truncation)
        ids = self._tokenise(texts)
        result: list[EncodedPair | ItemError] = []
        for at in range(0, len(texts), 2):
            result.append(self.pair(texts[at : at + 2], ids[at : at + 2], truncation))
        return result

    def encode_texts(
        self, items: Sequence[ScoreItem], truncation: Truncation = "error"
    ) -> list[EncodedText | ItemError]:
        """Token ids of each item."""
        singles = [(item.prompt, (item.response,)) for item in items]
        encoded = self.encode_responses(singles, truncation)
        return [each if isinstance(each, ItemError) else each[0] for each in encoded]

    def encode_responses(
        self,
        items: Sequence[tuple[Prompt, Sequence[str]]],
        truncation: Truncation = "error",
    ) -> list[list[EncodedText] | ItemError]:
        """Token ids of each prompt with each of its responses.

        If one text is too long and truncation is prompt_left, all lose the same oldest tokens of
        the prompt, so that all responses are compared after the same prompt.
        """
        texts: list[JoinedText | ItemError] = []
        for prompt, responses in items:
            texts += self._texts(prompt, responses, truncation)
        ids = self._tokenise(texts)
        result: list[list[EncodedText] | ItemError] = []
        at = 0
        for _, responses in items:
            those = slice(at, at + len(responses))
            result.append(self.several(texts[those], ids[those], truncation))
            at = those.stop
        return result

    def pair(
        self,
        texts: Sequence[JoinedText | ItemError],
        ids: Sequence[list[int]],
        truncation: Truncation,
    ) -> EncodedPair | ItemError:
        """A pair from the ids of its two texts, with a truncated prompt if they are too long."""
        fitted = self.fit(texts, ids, truncation, tokens=max(map(len, ids)))
        if isinstance(fitted, ItemError):
            return fitted
        (a, b), truncated = fitted
        return EncodedPair(a, b, truncated)

    def several(
        self,
        texts: Sequence[JoinedText | ItemError],
        ids: Sequence[list[int]],
        truncation: Truncation,
    ) -> list[EncodedText] | ItemError:
        """The texts of one prompt from their ids, with a truncated prompt if one is too long."""
        fitted = self.fit(texts, ids, truncation, tokens=max(map(len, ids)))
        if isinstance(fitted, ItemError):
            return fitted
        of_texts, truncated = fitted
        return [EncodedText(of_text, truncated) for of_text in of_texts]

    def save(self, folder: Path) -> None:
        """Write the files of the tokenizer; `write_card` writes annotator.json with the spec."""
        self.tokenizer.save_pretrained(folder)

    def _texts(
        self, prompt: Prompt, responses: Sequence[str], truncation: Truncation
    ) -> Sequence[JoinedText | ItemError]:
        """The prompt with each response, all cut alike or all refused where one is huge."""
        limit = self._max_characters
        size = _characters(prompt) + max(map(len, responses))
        if size > limit and truncation == "error":
            return [_too_many_characters(size, self.max_length)] * len(responses)
        try:
            longest, texts = self._joined(prompt, responses, is_huge=size > limit)
        except Exception as error:
            # Chat templates are programs that come with the model and may refuse a conversation.
            refusal = ItemError(
                code="invalid_row", detail=f"the chat template rejects the conversation: {error}"
            )
            return [refusal] * len(responses)
        if longest <= limit:
            return texts
        if truncation == "error":
            return [_too_many_characters(longest, self.max_length)] * len(responses)
        if min(text.prompt_end - text.prompt_start for text in texts) < 0:
            of_response = max(len(response) for response in responses)
            return [_response_of_too_many(of_response, self.max_length)] * len(responses)
        return texts

    def _joined(
        self, prompt: Prompt, responses: Sequence[str], *, is_huge: bool
    ) -> tuple[int, list[JoinedText]]:
        """The characters of the longest text, and all texts without what it has over the limit."""
        joined: Iterable[JoinedText]
        if is_huge:
            # One at a time: each has all of the prompt before it is cut.
            longest = max(len(self._join(prompt, response).text) for response in responses)
            joined = (self._join(prompt, response) for response in responses)
        else:
            joined = texts = [self._join(prompt, response) for response in responses]
            longest = max(len(text.text) for text in texts)
        excess = longest - self._max_characters
        return longest, [text.without_oldest(excess) if excess > 0 else text for text in joined]

    def _join(self, prompt: Prompt, response: str) -> JoinedText:
        if self.spec.reading is not None:
            return READINGS[self.spec.reading].join(self.tokenizer, prompt, response)
        if isinstance(prompt, str):
            at_seam = prompt[-1:] + response[:1]
            has_seam = prompt == "" or any(char.isspace() for char in at_seam)
            return join_text(prompt, response, "" if has_seam else self.spec.join)
        joined = join_chat(self.tokenizer, prompt, response)
        # Templates end in a newline after their end-of-turn token, which may be EOS.
        return joined.stripped() if joined.is_templated else joined

    def _tokenise(self, texts: Sequence[JoinedText | ItemError]) -> list[list[int]]:
        joined = [text for text in texts if isinstance(text, JoinedText)]
        ids = iter(token_ids(self.tokenizer, joined))
        return [self._ended(next(ids)) if isinstance(text, JoinedText) else [] for text in texts]

    def _ended(self, ids: list[int]) -> list[int]:
        if self._eos is None:
            return ids
        if self.spec.eos and self.spec.reading is not None:
            return ids
        if self.spec.eos and (not ids or ids[-1] != self._eos):
            ids.append(self._eos)
        while not self.spec.eos and len(ids) > 1 and ids[-1] == self._eos:
            ids.pop()
        return ids

    def fit(
        self,
        texts: Sequence[JoinedText | ItemError],
        ids: Sequence[list[int]],
        truncation: Truncation,
        *,
        tokens: int,
    ) -> tuple[list[list[int]], bool] | ItemError:
        """The ids of texts that share a prompt, all cut alike where `tokens` exceed max_length."""
        excess = tokens - self.max_length
        size = f"{tokens:,} tokens where max_length is {self.max_length:,}"
        fitted = []
        for text, of_text in zip(texts, ids, strict=True):
            if isinstance(text, ItemError):
                return text
            if excess <= 0:
                fitted.append(of_text)
                continue
            if truncation == "error":
                return ItemError(
                    code="too_long",
                    detail=f"{size}; truncation prompt_left would cut the prompt",
                )
            start, end = prompt_range(self.tokenizer, text)
            if end - start < excess:
                return ItemError(
                    code="response_too_long",
                    detail=f"{size}; even without the {end - start:,} tokens of its prompt it "
                    "would be too long, and responses are never cut",
                )
            fitted.append(of_text[:start] + of_text[start + excess :])
        is_cut = any(isinstance(text, JoinedText) and text.is_cut for text in texts)
        return fitted, excess > 0 or is_cut


def _characters(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def _too_many_characters(size: int, max_length: int) -> ItemError:
    return ItemError(
        code="too_long",
        detail=f"{size:,} characters where max_length is {max_length:,} tokens; truncation "
        "prompt_left would cut the prompt",
    )


def _response_of_too_many(size: int, max_length: int) -> ItemError:
    return ItemError(
        code="response_too_long",
        detail=f"a response of {size:,} characters where max_length is {max_length:,} tokens: "
        "responses are never cut",
    )
