"""The one path from prompt and response to token ids: in training, annotation and serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from cwpo.types import ItemError, Message, Prompt, ScoreItem, Triplet, Truncation
from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.checkpoint import CheckpointError, EncodingSpec, read_card

DEFAULT_MAX_LENGTH = 1024
_PAD_CANDIDATES = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|fim_pad|>")
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


class Encoder:
    """Joins prompt and response, tokenises them together and ends them with EOS.

    A text prompt is joined to its response by `spec.join`, unless white space stands at the seam
    already (as in transcripts that end in "Assistant:" before " Sure"). A chat prompt goes through
    the tokenizer's chat template, or becomes a Human/Assistant transcript where there is none.
    Responses are never cut.
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
        self._fast: Any = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()

    @classmethod
    def create(
        cls, folder: Path, *, max_length: int = DEFAULT_MAX_LENGTH, join: str = "\n\n"
    ) -> Encoder:
        """The encoder for a model that is to become an annotator.

        max_length is lowered to what the model's position embeddings allow. A tokenizer without a
        dedicated pad token gets one; if it is new, `len(tokenizer)` has grown and the model's
        embeddings must follow.
        Raises: CheckpointError for a tokenizer that does not end a text.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.eos_token_id is None and not _ends_texts(tokenizer):
            raise CheckpointError(
                f"{folder}: the tokenizer has no EOS token and ends no text by itself: "
                "name one as eos_token in tokenizer_config.json"
            )
        longest = min(max_length, _positions(folder) or max_length)
        spec = EncodingSpec(join=join, max_length=longest, pad_token=_dedicated_pad(tokenizer))
        return cls(tokenizer, spec)

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """The encoder of a checkpoint, as its annotator.json says.

        A folder without annotator.json (a reward model from elsewhere) gets the defaults of
        `create`. Raises: CheckpointError where tokenizer and annotator.json do not fit.
        """
        card = read_card(folder)
        if card is None:
            return cls.create(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        positions = _positions(folder)
        if positions is not None and card.encoding.max_length > positions:
            raise CheckpointError(
                f"{folder}: annotator.json says max_length {card.encoding.max_length}, "
                f"but the model has {positions} positions"
            )
        return cls(tokenizer, card.encoding)

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
            for response in (triplet.response_a, triplet.response_b):
                texts.append(self._text(triplet.prompt, response))
        ids = self._tokenise(texts)
        result: list[EncodedPair | ItemError] = []
        for at in range(0, len(texts), 2):
            result.append(self.pair(texts[at : at + 2], ids[at : at + 2], truncation))
        return result

    def encode_texts(
        self, items: Sequence[ScoreItem], truncation: Truncation = "error"
    ) -> list[EncodedText | ItemError]:
        """Token ids of each item."""
        texts = [self._text(item.prompt, item.response) for item in items]
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

    def _text(self, prompt: Prompt, response: str) -> Text | ItemError:
        try:
            return self._join(prompt, response)
        except Exception as error:
            # Chat templates are programs that come with the model and may refuse a conversation.
            return ItemError(code="invalid_row", detail=f"the chat template refuses it: {error}")

    def _join(self, prompt: Prompt, response: str) -> Text:
        if isinstance(prompt, str):
            return _joined(prompt, response, self.spec.join)
        if self.tokenizer.chat_template is None:
            transcript = "".join(_SPEAKERS[turn.role] + turn.content for turn in prompt)
            return _joined(transcript + "\n\nAssistant:", " " + response.lstrip(), "")
        turns = [turn.model_dump() for turn in prompt]
        answer = Message(role="assistant", content=response).model_dump()
        render = self.tokenizer.apply_chat_template
        whole = str(render([*turns, answer], tokenize=False)).rstrip()
        opening = str(render(turns, tokenize=False, add_generation_prompt=True))
        start = common_prefix(whole, opening)
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
                result[at] = self._with_eos(encoding.ids)
        return result

    def _with_eos(self, ids: list[int]) -> list[int]:
        if self._eos is not None and (not ids or ids[-1] != self._eos):
            ids.append(self._eos)
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
        return fitted, excess > 0

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


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items a and b have in common from the first on."""
    for at, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return at
    return min(len(a), len(b))


def _positions(folder: Path) -> int | None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text gets a token at its end that is not of its words, such as BERT's [SEP]."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[-1] in tokenizer.all_special_ids


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
