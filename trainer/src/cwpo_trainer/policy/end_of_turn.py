"""The token with which a chat template ends an answer, and at which generation therefore stops.

Base models often come with a template whose turns end otherwise than their texts: the tokenizer's
EOS is then no token that an answer ends with.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from cwpo.types import Message
from cwpo_annotator.encoding.joining import join_chat
from cwpo_trainer.run import process

_QUESTION, _ANSWER = "Question", "4f1d-answer-9c27"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first special token that the chat template writes after an answer.

    Returns: None without a template, and for one that ends answers without a special token.
    """
    if tokenizer.chat_template is None:
        return None
    written = join_chat(tokenizer, [Message(role="user", content=_QUESTION)], _ANSWER).text
    after: list[int] = tokenizer(written.rpartition(_ANSWER)[2], add_special_tokens=False).input_ids
    # Those without a role of their own are only in the first.
    special = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    special.discard(tokenizer.unk_token_id)
    ends = (token for token in after if token in special)
    found = next(ends, None)
    return None if found is None else str(tokenizer.convert_ids_to_tokens(found))


def stop_at_end_of_turn(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Let generation stop at the end of a turn and at EOS, besides where the model has it stop.

    Args:
        config: the model's, which is saved with it; changed.
    Returns: the tokens at which it did not stop before.
    """
    ends = [end for end in (end_of_turn(tokenizer), tokenizer.eos_token) if end is not None]
    known = stops_of(config)
    ids = {tokenizer.convert_tokens_to_ids(end): str(end) for end in ends}
    new = [at for at in ids if at not in known]
    if new:
        config.eos_token_id = [*new, *known]
    return [ids[at] for at in new]


def stops_of(config: GenerationConfig) -> list[int]:
    """The tokens at which generation stops."""
    stops = config.eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else [*stops]


def end_turns(policy: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Have a policy that is about to be trained stop where its answers will end.

    Says so where answers end otherwise than texts do, and the policy has not stopped there yet.
    Returns: the figure for run.json.
    """
    end = end_of_turn(tokenizer)
    is_new = end in stop_at_end_of_turn(policy.generation_config, tokenizer)
    if is_new and end != tokenizer.eos_token and process.is_main():
        print(
            f"answers end with {end}, as the chat template writes them, not with the tokenizer's "
            f"EOS {tokenizer.eos_token}: generation will stop at both",
            file=sys.stderr,
        )
    return {"end_of_turn": end}
