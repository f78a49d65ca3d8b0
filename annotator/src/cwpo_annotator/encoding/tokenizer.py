"""The tokenizer of a checkpoint, and what its model's configuration says about token ids."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from cwpo.errors import first_line
from cwpo_annotator import checkpoint
from cwpo_annotator.checkpoint import CheckpointError

_PAD_CANDIDATES = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|fim_pad|>")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; that of its base model for an adapter without one.

    Raises: CheckpointError where none can be loaded.
    """
    has_own = (folder / "tokenizer_config.json").is_file()
    place = folder if has_own else checkpoint.base_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: the tokenizer cannot be loaded: {first_line(error)}"
        ) from error


def dedicated_pad(tokenizer: PreTrainedTokenizerBase) -> str:
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


def positions(folder: Path) -> int | None:
    """Tokens that the model has positions for; None where it has no such limit."""
    count = getattr(_config(folder), "max_position_embeddings", None)
    return int(count) if count else None


def architectures(folder: Path) -> list[str]:
    """The classes that config.json names for the model."""
    return list(_config(folder).architectures or [])


def pads_with_eos(folder: Path) -> bool:
    """Whether the model's config names EOS as its pad token."""
    pad = getattr(_config(folder), "pad_token_id", None)
    return pad is not None and pad == load_tokenizer(folder).eos_token_id


def _config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(checkpoint.base_folder(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: config.json: {first_line(error)}") from error
    text_config: PretrainedConfig = config.get_text_config()
    return text_config
