"""Replies of a language model, kept in a file as they come, so that none is paid for twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from threading import Lock

from pydantic import ValidationError

from cwpo_trainer.evaluation.chat_endpoint import Reply


class KeptReplies:
    """The replies of one model by question; may be used by several threads.

    Args:
        path: JSON lines; what a run that was stopped left there is taken up.
        model: its name; replies of other models may be in the same file.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._model = model
        self._replies = dict(_read(path))
        self._lock = Lock()
        is_cut = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", buffering=1)
        if is_cut and self._replies:
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


def _read(path: Path) -> list[tuple[str, Reply]]:
    """Those in a file, but for a line that was cut when the process was killed."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
            found.append((values.pop("key"), Reply.model_validate(values)))
        except (ValueError, LookupError, AttributeError, ValidationError):
            continue
    return found
