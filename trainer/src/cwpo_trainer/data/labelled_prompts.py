"""Which prompts an annotator has seen labels of, kept in its folder as hashes.

On labels of these prompts, and of prompts of the same conversations, its accuracy tells nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

from cwpo.errors import DatasetError, mistake_in
from cwpo.types import Prompt
from cwpo_trainer.data.conversations import conversation_key, earlier_keys
from cwpo_trainer.data.labelled import LabelledPair

LABELLED_PROMPTS_NAME = "labelled_prompts.json"

# Sorted, so that the same prompts make the same file.
_Hashes = Annotated[frozenset[str], PlainSerializer(sorted, return_type=list[str])]


class LabelledPrompts(BaseModel):
    """labelled_prompts.json: the prompts that an annotator was trained, stopped or calibrated on.

    prompts: hash of each; earlier: hash of each prompt that one of these continues.
    """

    model_config = ConfigDict(extra="forbid")

    prompts: _Hashes
    earlier: _Hashes

    @classmethod
    def of(cls, pairs: Iterable[LabelledPair]) -> LabelledPrompts:
        """Those of the pairs."""
        distinct = {conversation_key(pair.prompt): pair.prompt for pair in pairs}
        before = {key for prompt in distinct.values() for key in earlier_keys(prompt)}
        return cls(prompts=frozenset(map(_hash, distinct)), earlier=frozenset(map(_hash, before)))

    def write(self, folder: Path) -> None:
        """Write the file into the folder."""
        text = self.model_dump_json(indent=2)
        (folder / LABELLED_PROMPTS_NAME).write_text(text + "\n")

    def share_a_conversation(self, prompt: Prompt) -> bool:
        """Whether it is one of them, continues one, or is continued by one."""
        key = _hash(conversation_key(prompt))
        if key in self.prompts or key in self.earlier:
            return True
        return any(_hash(before) in self.prompts for before in earlier_keys(prompt))


def labelled_prompts(folder: Path) -> LabelledPrompts | None:
    """Those of the annotator in the folder; None if it does not tell them.

    Raises: DatasetError for a file that cannot be read.
    """
    path = folder / LABELLED_PROMPTS_NAME
    if not path.is_file():
        return None
    try:
        return LabelledPrompts.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DatasetError(f"{path}: {mistake_in(error)}") from error


def check_unseen(pairs: Sequence[LabelledPair], seen: LabelledPrompts, source: str) -> None:
    """Check that no pair is of a conversation that the annotator has seen labels of.

    Raises: DatasetError naming the first one that is.
    """
    known = [pair.id for pair in pairs if seen.share_a_conversation(pair.prompt)]
    if known:
        raise DatasetError(
            f"{source}: {len(known):,} of {len(pairs):,} pairs are of conversations that this "
            f"annotator was trained or calibrated on; the first has the id {known[0]!r}. Measure "
            "it on others, such as held_out.jsonl in the --splits of `cwpo train-annotator`"
        )


def _hash(key: str) -> str:
    """16 hex digits: of a million prompts, two have the same once in 30 million times."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]
