"""Replies of a language model, kept in a file as they come, so that none is paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from cwpo_trainer.evaluation.chat_endpoint import Reply


class KeptReplies:
    """The replies of one model by question; may be used by several threads.

    Args:
        path: JSON lines; what a run that was stopped left there is taken up.
        model: its name; replies of other models may be in the same file.
    """

    def __init__(self, path: Path, model: str) -> None:
        kept = path.read_text() if path.is_file() else ""
        self._model = model
        self._replies = dict(_replies_in(kept))
        self._lock = Lock()
        self._file = path.open("a", buffering=1)
        if kept and not kept.endswith("\n"):
            self._file.write("\n")

    def __contains__(self, question: str) -> bool:
        return self._key(question) in self._replies

    def __getitem__(self, question: str) -> Reply:
        return self._replies[self._key(question)]

    def keep(self, question: str, reply: Reply) -> None:
        """Write a reply to the file."""
        key = self._key(question)
        with self._lock:
            self._replies[key] = reply
            self._file.write(json.dumps({"key": key, **reply.model_dump()}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _key(self, question: str) -> str:
        return hashlib.sha256(f"{self._model}\n{question}".encode()).hexdigest()


def _replies_in(kept: str) -> Iterator[tuple[str, Reply]]:
    """By key; without a line that was cut when the process was killed."""
    for line in kept.splitlines():
        try:
            values = json.loads(line)
            yield values.pop("key"), Reply.model_validate(values)
        except (ValueError, LookupError, AttributeError):
            continue
