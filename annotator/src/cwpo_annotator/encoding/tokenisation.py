"""From joined texts to token ids, and where among them the prompt ends and the response starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from cwpo_annotator.encoding.joining import JoinedText
from cwpo_annotator.encoding.prefix import common_prefix

# One text, or two that the tokenizer joins.
_Input = str | tuple[str, str]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[JoinedText]) -> list[list[int]]:
    """The token ids of each text, prompt and response together."""
    return _ids(tokenizer, [(_input(text), text.is_templated) for text in texts])


def opening_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[JoinedText]) -> list[list[int]]:
    """The token ids of each text's opening, which a model is given to answer."""
    return _ids(tokenizer, [(text.opening, text.is_templated) for text in texts])


def separators(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens before which a templated text can be cut: its parts have its ids together.

    Such a token takes no white space from before itself, and none of the tokens that a tokenizer
    looks for in a text first can begin before the place and end behind it.
    """
    added = [*tokenizer.added_tokens_decoder.values()] if tokenizer.is_fast else []
    return [
        token.content
        for token in added
        if token.special and not (token.lstrip or token.normalized or token.single_word)
        if not any(token.content[0] in other.content[1:] for other in added)
    ]


def opening_and_whole_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[JoinedText], separators: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """The token ids of each text's opening, and those of the text.

    What both begin with is encoded once, up to the last of the separators, and so is what several
    of them have in common.
    """
    parts: list[tuple[_Input, bool]] = []
    for text in texts:
        at = _cut(text, separators)
        # Of a text that is not cut there is no head, which would have special tokens of its own.
        parts.append((text.text[:at], True))
        parts += [(part, text.is_templated) for part in (text.opening[at:], text.text[at:])]
    distinct = [*dict.fromkeys(parts)]
    known = dict(zip(distinct, _ids(tokenizer, distinct), strict=True))
    ids = map(known.__getitem__, parts)
    return [
        (head + opening, head + whole) for head, opening, whole in zip(ids, ids, ids, strict=True)
    ]


def prompt_range(tokenizer: PreTrainedTokenizerBase, text: JoinedText) -> tuple[int, int]:
    """The first position that holds the prompt alone, and the one after the last such position."""
    encoding = _encoding(tokenizer, text)
    special = encoding.special_tokens_mask
    own = (
        at
        for at, ((first, _), mask) in enumerate(zip(encoding.offsets, special, strict=True))
        if not mask and first >= text.prompt_start
    )
    start = next(own, len(special))
    if text.is_templated:
        start = 0
    end = start
    for (_, last), mask in zip(encoding.offsets[start:], special[start:], strict=True):
        if last > text.prompt_end or (mask and not text.is_templated):
            break
        end += 1
    return start, end


def response_start(tokenizer: PreTrainedTokenizerBase, text: JoinedText) -> int:
    """The position of the first token that holds some of the response.

    So for annotators, which read finished texts only. A policy's response starts where its
    opening's ids end: see `response_start_after`.
    """
    encoding = _encoding(tokenizer, text)
    ends = (end for _, end in encoding.offsets)
    return next((at for at, end in enumerate(ends) if end > text.response_start), len(encoding))


def response_start_after(opening: Sequence[int], whole: Sequence[int]) -> int:
    """The position where the ids of a text part ways with those of its opening, as in TRL.

    So for policies, which go on from the opening: white space at its end may be another token
    there than before a response, and then belongs to what a policy is trained to write.
    """
    return common_prefix(opening, whole)


def _cut(text: JoinedText, separators: Sequence[str]) -> int:
    """The character before which it is cut; 0 where it cannot be."""
    if not text.is_templated:
        return 0
    return max([0, *(text.text.rfind(token, 0, text.prompt_end) for token in separators)])


def _input(text: JoinedText) -> _Input:
    if not text.is_pair:
        return text.text
    return text.text[: text.response_start], text.text[text.response_start :]


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[_Input, bool]]
) -> list[list[int]]:
    """The ids of texts, each with whether a template wrote it, and in it the special tokens."""
    result: list[list[int]] = [[] for _ in texts]
    for is_templated in (False, True):
        places = [at for at, (_, templated) in enumerate(texts) if templated == is_templated]
        if places:
            chosen = [texts[at][0] for at in places]
            ids = _encode(tokenizer, chosen, add_special_tokens=not is_templated)
            for at, of_text in zip(places, ids, strict=True):
                result[at] = of_text
    return result


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[_Input], *, add_special_tokens: bool
) -> list[list[int]]:
    if not tokenizer.is_fast:
        encoded = tokenizer(texts, add_special_tokens=add_special_tokens)
        slow: list[list[int]] = encoded["input_ids"]
        return slow
    # Twice as fast as the tokenizer's own call.
    fast = _backend(tokenizer)
    encodings = fast.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def _encoding(tokenizer: PreTrainedTokenizerBase, text: JoinedText) -> Any:
    backend = _backend(tokenizer)
    (encoding,) = backend.encode_batch([_input(text)], add_special_tokens=not text.is_templated)
    return encoding


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend: Any = tokenizer.backend_tokenizer
    # As a call of the tokenizer's may have left them. Without need nothing is changed: another
    # thread may be encoding.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend
