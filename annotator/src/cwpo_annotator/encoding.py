"""The one path from prompt and response to token ids: in training, annotation and serving."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from cwpo.types import ItemError, Prompt, ScoreItem, Triplet, Truncation
from cwpo_annotator import checkpoint
from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.checkpoint import CheckpointError, EncodingSpec, read_card

logger = logging.getLogger("cwpo_annotator")

DEFAULT_MAX_LENGTH = 1024
_PAD_CANDIDATES = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|fim_pad|>")
# The least that a limit in characters counts a token for: white space and long unknown words may
# come down to very few tokens.
_CHARACTERS_PER_TOKEN = 100
_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt with a response, to tokenise whole.

    The prompt ends at character `boundary`, the response starts at character `response`.
    """

    text: str
    boundary: int
    response: int
    is_templated: bool
    is_cut: bool = False

    def without(self, characters: int) -> Text:
        """The same text without so many characters of its prompt, the oldest."""
        boundary, response = self.boundary - characters, self.response - characters
        return Text(self.text[characters:], boundary, response, self.is_templated, True)


class Encoder:
    """Joins prompt and response, tokenises them together and ends them with EOS.

    A text prompt is joined to its response by `spec.join`, unless white space stands at the seam
    already (as in transcripts that end in "Assistant:" before " Sure"). A chat prompt goes through
    the tokenizer's chat template, or becomes a Human/Assistant transcript where there is none.
    Responses are never cut. A text of more characters than max_length tokens can have is not
    tokenised, so that a huge one costs neither time nor memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: EncodingSpec) -> None:
        if not tokenizer.is_fast:
            raise CheckpointError("the tokenizer has no fast (tokenizers) version")
        pad = tokenizer.convert_tokens_to_ids(spec.pad_token)
        if not isinstance(pad, int) or pad == tokenizer.eos_token_id:
            raise CheckpointError(
                f"the pad token {spec.pad_token!r} is no token of its own in this tokenizer"
            )
        tokenizer.pad_token = spec.pad_token
        self.tokenizer = tokenizer
        self.spec = spec
        self.pad_token_id: int = pad
        self._eos: int | None = tokenizer.eos_token_id
        longest = max(map(len, tokenizer.get_vocab()))
        self._max_characters = spec.max_length * max(longest, _CHARACTERS_PER_TOKEN)
        self._fast: Any = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        max_length: int = DEFAULT_MAX_LENGTH,
        join: str = "\n\n",
        eos: bool = True,
    ) -> Encoder:
        """The encoder for a model that is to become an annotator.

        max_length is lowered to what the model's positions and its tokenizer allow. A tokenizer
        without a dedicated pad token gets one; if it is new, `len(tokenizer)` has grown and the
        model's embeddings must follow.
        """
        tokenizer = _tokenizer(folder)
        longest = min(max_length, _positions(folder) or max_length, tokenizer.model_max_length)
        pad = _dedicated_pad(tokenizer)
        spec = EncodingSpec(join=join, max_length=longest, pad_token=pad, eos=eos)
        return cls(tokenizer, spec)

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """The encoder of a checkpoint, as its annotator.json says.

        A folder without annotator.json (a reward model from elsewhere) gets the defaults of
        `create`, and the log says which they are. Where its config pads with EOS, transformers'
        head has never read EOS but the token before it: such texts are left without EOS.
        Raises: CheckpointError where tokenizer and annotator.json do not fit.
        """
        card = read_card(folder)
        if card is None:
            encoder = cls.create(folder, eos=not _pads_with_eos(folder))
            logger.warning(
                "%s has no annotator.json; by default: %s", folder, _in_words(encoder.spec)
            )
            return encoder
        tokenizer = _tokenizer(folder)
        positions = _positions(folder)
        if positions is not None and card.encoding.max_length > positions:
            raise CheckpointError(
                f"{folder}: annotator.json says max_length {card.encoding.max_length}, "
                f"but the model has {positions} positions"
            )
        return cls(tokenizer, card.encoding)

    @property
    def ends_texts(self) -> bool:
        """Whether a text gets a token at its end that is not of its words: EOS, or BERT's [SEP]."""
        if self.spec.eos and self._eos is not None:
            return True
        ids = self.tokenizer("a")["input_ids"]
        return bool(ids) and ids[-1] in self.tokenizer.all_special_ids

    @property
    def max_length(self) -> int:
        """Tokens a text may have."""
        return self.spec.max_length

    def encode_pairs(
        self, triplets: Sequence[Triplet], truncation: Truncation = "error"
    ) -> list[EncodedPair | ItemError]:
        """Token ids of both texts of each triplet.

        Where one text is too long and truncation is prompt_left, both lose the same oldest tokens
        of the prompt, so that both responses are judged against the same prompt.
        """
        texts: list[Text | ItemError] = []
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
        texts = [
            text
            for item in items
            for text in self._texts(item.prompt, (item.response,), truncation)
        ]
        tokenised = zip(texts, self._tokenise(texts), strict=True)
        return [self.single(text, ids, truncation) for text, ids in tokenised]

    def pair(
        self, texts: Sequence[Text | ItemError], ids: Sequence[list[int]], truncation: Truncation
    ) -> EncodedPair | ItemError:
        """A pair of the ids of its two texts, cut where they are too long."""
        fitted = self.fit(texts, ids, truncation, tokens=max(map(len, ids)))
        if isinstance(fitted, ItemError):
            return fitted
        (a, b), truncated = fitted
        return EncodedPair(a, b, common_prefix(a, b), truncated)

    def single(
        self, text: Text | ItemError, ids: list[int], truncation: Truncation
    ) -> EncodedText | ItemError:
        """A text of its ids, cut where they are too long."""
        fitted = self.fit([text], [ids], truncation, tokens=len(ids))
        if isinstance(fitted, ItemError):
            return fitted
        (only,), truncated = fitted
        return EncodedText(only, truncated)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files; the spec goes into annotator.json with the rest."""
        self.tokenizer.save_pretrained(folder)

    def _texts(
        self, prompt: Prompt, responses: Sequence[str], truncation: Truncation
    ) -> Sequence[Text | ItemError]:
        """The prompt with each response, all cut alike or all refused where one is huge."""
        limit = self._max_characters
        size = _characters(prompt) + max(map(len, responses))
        if size > limit and truncation == "error":
            return [_too_many_characters(size, self.max_length)] * len(responses)
        try:
            texts = [self._join(prompt, response) for response in responses]
        except Exception as error:
            # Chat templates are programs that come with the model and may refuse a conversation.
            refusal = ItemError(code="invalid_row", detail=f"the chat template refuses it: {error}")
            return [refusal] * len(responses)
        excess = max(len(text.text) for text in texts) - limit
        if excess <= 0:
            return texts
        if truncation == "error":
            return [_too_many_characters(excess + limit, self.max_length)] * len(responses)
        if excess > min(text.boundary for text in texts):
            longest = max(len(response) for response in responses)
            return [_response_of_too_many(longest, self.max_length)] * len(responses)
        return [text.without(excess) for text in texts]

    def _join(self, prompt: Prompt, response: str) -> Text:
        if isinstance(prompt, str):
            return _joined(prompt, response, self.spec.join)
        if self.tokenizer.chat_template is None:
            transcript = "".join(_SPEAKERS[turn.role] + turn.content for turn in prompt)
            return _joined(transcript + "\n\nAssistant:", " " + response.lstrip(), "")
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        answer = {"role": "assistant", "content": response}
        render = self.tokenizer.apply_chat_template
        whole = str(render([*turns, answer], tokenize=False)).rstrip()
        opening = str(render(turns, tokenize=False, add_generation_prompt=True))
        is_opening = whole.startswith(opening)
        start = len(opening) if is_opening else common_prefix(whole, opening)
        return Text(whole, start, start, is_templated=True)

    def _tokenise(self, texts: Sequence[Text | ItemError]) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in texts]
        for is_templated in (False, True):
            # A chat template writes the special tokens itself.
            chosen = [
                (at, text.text)
                for at, text in enumerate(texts)
                if isinstance(text, Text) and text.is_templated == is_templated
            ]
            encodings = self._fast.encode_batch_fast(
                [text for _, text in chosen], add_special_tokens=not is_templated
            )
            for (at, _), encoding in zip(chosen, encodings, strict=True):
                result[at] = self._ended(encoding.ids)
        return result

    def _ended(self, ids: list[int]) -> list[int]:
        if self._eos is None:
            return ids
        if self.spec.eos and (not ids or ids[-1] != self._eos):
            ids.append(self._eos)
        while not self.spec.eos and len(ids) > 1 and ids[-1] == self._eos:
            ids.pop()
        return ids

    def fit(
        self,
        texts: Sequence[Text | ItemError],
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
            start, end = self.prompt_tokens(text)
            if end - start < excess:
                return ItemError(
                    code="response_too_long",
                    detail=f"{size}, and the prompt has only {end - start:,} to give: "
                    "responses are never cut",
                )
            fitted.append(of_text[:start] + of_text[start + excess :])
        is_cut = any(isinstance(text, Text) and text.is_cut for text in texts)
        return fitted, excess > 0 or is_cut

    def prompt_tokens(self, text: Text) -> tuple[int, int]:
        """The range of token positions that hold the prompt alone."""
        encoding = self._fast.encode(text.text, add_special_tokens=not text.is_templated)
        special = encoding.special_tokens_mask
        start = next((i for i, mask in enumerate(special) if not mask), 0)
        if text.is_templated:
            start = 0
        end = start
        for (_, last), mask in zip(encoding.offsets[start:], special[start:], strict=True):
            if last > text.boundary or (mask and not text.is_templated):
                break
            end += 1
        return start, end

    def response_start(self, text: Text) -> int:
        """The position of the first token that holds some of the response."""
        encoding = self._fast.encode(text.text, add_special_tokens=not text.is_templated)
        ends = (end for _, end in encoding.offsets)
        return next((at for at, end in enumerate(ends) if end > text.response), len(encoding.ids))


def _joined(prompt: str, response: str, join: str) -> Text:
    at_seam = prompt[-1:] + response[:1]
    if prompt == "" or any(char.isspace() for char in at_seam):
        join = ""
    opening = prompt + join
    return Text(opening + response, len(prompt), len(opening), is_templated=False)


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


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items a and b have in common from the first on."""
    for at, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return at
    return min(len(a), len(b))


def _in_words(spec: EncodingSpec) -> str:
    return (
        f"at most {spec.max_length:,} tokens a text, {spec.join!r} between a text prompt and its "
        f"response, {'' if spec.eos else 'no '}EOS at the end, pad token {spec.pad_token}"
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    has_own = (folder / "tokenizer_config.json").is_file()
    place = folder if has_own else checkpoint.base(folder)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: no tokenizer that can be loaded: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(checkpoint.base(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: config.json: {_line(error)}") from error
    text_config: PretrainedConfig = config.get_text_config()
    return text_config


def _positions(folder: Path) -> int | None:
    positions = getattr(_config(folder), "max_position_embeddings", None)
    return int(positions) if positions else None


def _pads_with_eos(folder: Path) -> bool:
    pad = getattr(_config(folder), "pad_token_id", None)
    return pad is not None and pad == _tokenizer(folder).eos_token_id


def _dedicated_pad(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pad token that is not EOS: the score is read at the last token that is not padding."""
    taken = {tokenizer.eos_token_id}
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in taken:
        return str(tokenizer.pad_token)
    vocabulary = tokenizer.get_vocab()
    for candidate in _PAD_CANDIDATES:
        if vocabulary.get(candidate, tokenizer.eos_token_id) not in taken:
            return candidate
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return "<|pad|>"
