"""Pairs and answers in the forms of other tools: Argilla, Label Studio, CSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import TypeAdapter, ValidationError

from cwpo.errors import DatasetError, mistake_in
from cwpo.reviews.pairs import ReviewAnswer, ReviewPair
from cwpo.types import Message, Prompt

ReviewForm = Literal["argilla", "label-studio", "csv"]

_TEXTS = ("id", "prompt", "response_a", "response_b")
_COLUMNS = [*_TEXTS, "preferred", "reviewer", "annotator", "confidence"]
# What a spreadsheet runs as a formula (CWE-1236). With an apostrophe before it, it is a text; so is
# what looks like that, to tell them apart afterwards.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_CHAT = TypeAdapter(list[Message])
# What annotators of Label Studio choose: our own words, or the sides of its Pairwise tag.
_CHOICES = {"left": "a", "right": "b"}


def write_pairs(pairs: Sequence[ReviewPair], form: ReviewForm, sink: TextIO) -> None:
    """Write the pairs as that tool imports them, without an answer.

    argilla: records for `dataset.records.from_json`. label-studio: tasks. csv: a sheet whose
    columns `preferred` and `reviewer` are to be filled in; a text that a spreadsheet would run as a
    formula has an apostrophe before it, which `read_answers` takes away.
    """
    if form == "csv":
        writer = csv.DictWriter(sink, _COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_cells(pair) for pair in pairs)
        return
    record = _argilla_record if form == "argilla" else _label_studio_task
    json.dump([record(pair) for pair in pairs], sink, ensure_ascii=False, indent=1)
    sink.write("\n")


def read_answers(path: Path) -> list[ReviewAnswer]:
    """The answers in a file: CSV, an export of Argilla or Label Studio, or of the service (JSONL).

    Rows that nobody has answered are left out.
    Raises: DatasetError for a file of another form, or with an answer that is none.
    """
    try:
        return [*_answers(path)]
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error


def _answers(path: Path) -> Iterator[ReviewAnswer]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as stream:
            yield from _parsed(path, "row", csv.DictReader(stream), _of_cells)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from _parsed(path, "row", map(json.loads, lines), lambda row: [row])
    elif path.suffix == ".json":
        records = json.loads(path.read_text(encoding="utf-8"))
        yield from _parsed(path, "record", records, _of_record)
    else:
        raise DatasetError(f"{path}: answers are in a .csv, .json or .jsonl file")


def _parsed(
    path: Path,
    noun: str,
    records: Iterable[Any],
    answers_of: Callable[[Any], Iterable[dict[str, Any]]],
) -> Iterator[ReviewAnswer]:
    for number, record in enumerate(records, 1):
        try:
            for answer in answers_of(record):
                yield ReviewAnswer.model_validate(answer)
        except ValidationError as error:
            raise DatasetError(f"{path}: {noun} {number}: {mistake_in(error)}") from None
        except (KeyError, TypeError, AttributeError, IndexError):
            raise DatasetError(
                f"{path}: {noun} {number} is not what `cwpo review export` wrote, with answers"
            ) from None


def _cells(pair: ReviewPair) -> dict[str, Any]:
    texts = (pair.id, _prompt_cell(pair.prompt), pair.response_a, pair.response_b)
    return {
        **{name: _inert(text) for name, text in zip(_TEXTS, texts, strict=True)},
        "annotator": pair.annotator,
        "confidence": pair.confidence,
    }


def _of_cells(row: dict[str, str]) -> Iterator[dict[str, Any]]:
    preferred = row["preferred"].strip().lower()
    if not preferred:
        return
    texts = {name: _as_it_was(row[name]) for name in _TEXTS}
    yield {
        **texts,
        "prompt": _prompt(texts["prompt"]),
        "preferred": preferred,
        "reviewer": (row.get("reviewer") or "").strip() or "unnamed",
        "annotator": row.get("annotator") or None,
        "confidence": row.get("confidence") or None,
    }


def _inert(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text


def _as_it_was(cell: str) -> str:
    """The text that `_inert` made this cell of; one that a tool has rid of its mark stays."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _prompt_cell(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else _CHAT.dump_json([*prompt]).decode()


def _prompt(cell: str) -> Prompt:
    """The prompt in a cell: a text, or the JSON of chat messages."""
    try:
        return _CHAT.validate_json(cell)
    except ValidationError:
        return cell


def _beside(pair: ReviewPair) -> dict[str, Any]:
    """What the tool keeps, but need not show."""
    messages = {} if isinstance(pair.prompt, str) else {"messages": _prompt_cell(pair.prompt)}
    return {"annotator": pair.annotator, "confidence": pair.confidence, **messages}


def _texts(pair: ReviewPair) -> dict[str, str]:
    return {
        "prompt": pair.prompt_text,
        "response_a": pair.response_a,
        "response_b": pair.response_b,
    }


def _argilla_record(pair: ReviewPair) -> dict[str, Any]:
    return {
        "id": pair.id,
        "fields": _texts(pair),
        "metadata": _beside(pair),
        "suggestions": {},
        "responses": {},
        "vectors": {},
    }


def _label_studio_task(pair: ReviewPair) -> dict[str, Any]:
    return {"data": {"id": pair.id, **_texts(pair), **_beside(pair)}}


def _of_record(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "fields" in record:
        yield from _of_argilla(record)
    else:
        yield from _of_label_studio(record)


def _of_argilla(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pair = _restored(record["id"], record["fields"], record.get("metadata") or {})
    for response in (record.get("responses") or {}).get("preferred", []):
        if response.get("status", "submitted") == "submitted":
            yield {**pair, "preferred": response["value"], "reviewer": str(response["user_id"])}


def _of_label_studio(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    data = task["data"]
    pair = _restored(data["id"], data, data)
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled") or not annotation["result"]:
            continue
        value = annotation["result"][0]["value"]
        chosen = value["choices"][0] if "choices" in value else value["selected"]
        by = annotation.get("completed_by", "unnamed")
        yield {
            **pair,
            "preferred": _CHOICES.get(chosen, chosen),
            "reviewer": str(by.get("email") or by["id"]) if isinstance(by, dict) else str(by),
            "answered_at": annotation.get("created_at"),
        }


def _restored(id: str, texts: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    messages = beside.get("messages")
    return {
        "id": id,
        "prompt": texts["prompt"] if messages is None else _prompt(messages),
        "response_a": texts["response_a"],
        "response_b": texts["response_b"],
        "annotator": beside.get("annotator"),
        "confidence": beside.get("confidence"),
    }
