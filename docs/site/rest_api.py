"""Writes the reference of the REST interface, from openapi/openapi.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTRACT = Path(__file__).parents[2] / "openapi" / "openapi.json"
PAGE = "rest/README.md"
PROBLEM = "Problem"
Schema = dict[str, Any]


def pages() -> dict[str, str]:
    """One page: the calls, then what they send and answer."""
    contract = json.loads(CONTRACT.read_text())
    lines = [
        "# The REST interface",
        "",
        "Written from [openapi.json](../openapi/openapi.json), which clients can be generated "
        "from; a running service shows it at `/docs`. [The service](../docs/service.md) explains "
        f"keys, limits and time-outs. An error answer is a [{PROBLEM}](#{PROBLEM.lower()}) "
        "(`application/problem+json`).",
        "",
        "## Calls",
        "",
    ]
    for path, methods in contract["paths"].items():
        for method, call in methods.items():
            lines += call_lines(f"{method.upper()} {path}", call)
    lines += ["## Bodies", ""]
    for name, schema in contract["components"]["schemas"].items():
        lines += schema_lines(name, schema)
    return {PAGE: "\n".join(lines)}


def call_lines(title: str, call: dict[str, Any]) -> Iterator[str]:
    """A call: what it does, its parameters, its body and its answers."""
    yield from (f"### {title}", "", f"{call['summary']}. {call.get('description', '')}".strip(), "")
    parameters = call.get("parameters", [])
    if parameters:
        yield from ("| parameter | in | type | meaning |", "|---|---|---|---|")
        for each in parameters:
            meaning = each.get("description") or each["schema"].get("description", "")
            required = " (required)" if each.get("required") else ""
            kind = kind_of(each["schema"])
            yield f"| `{each['name']}`{required} | {each['in']} | {kind} | {cell(meaning)} |"
        yield ""
    if "requestBody" in call:
        yield from (f"Body: {contents(call['requestBody'])}", "")
    yield from ("| status | answer |", "|---|---|")
    for status, answer in call["responses"].items():
        content = "" if int(status) >= 400 else contents(answer)
        told = cell(answer["description"])
        yield f"| {status} | {told}{': ' if told and content else ''}{content} |"
    yield ""


def schema_lines(name: str, schema: Schema) -> Iterator[str]:
    """What is sent or answered: its fields."""
    yield from (f"### {name}", "")
    if "description" in schema:
        yield from (schema["description"], "")
    if "properties" not in schema:
        yield from (kind_of(schema), "")
        return
    required = schema.get("required", [])
    yield from ("| field | type | meaning |", "|---|---|---|")
    for field, each in schema["properties"].items():
        mark = " (required)" if field in required else ""
        yield f"| `{field}`{mark} | {kind_of(each)} | {cell(meaning_of(each))} |"
    yield ""


def meaning_of(schema: Schema) -> str:
    """The description of a field, which may stand at one of its alternatives; and its default."""
    alternatives = schema.get("anyOf", [])
    told = [schema.get("description"), *(each.get("description") for each in alternatives)]
    meaning: str = next((each for each in told if each), "")
    default = schema.get("default")
    return meaning if default is None else f"{meaning} (default: `{json.dumps(default)}`)".strip()


def contents(of: dict[str, Any]) -> str:
    """The media types of a body or an answer, and its schema where it is JSON."""
    found = []
    for media, body in of.get("content", {}).items():
        schema = body.get("schema", {})
        is_named = "$ref" in schema or schema.get("items", {}).get("$ref")
        found.append(kind_of(schema) if is_named else f"`{media}`")
    return " or ".join(found)


def kind_of(schema: Schema) -> str:
    """The type of a value, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(kind_of(each) for each in schema[key]))
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {kind_of(schema.get('items', {}))}"
    limits = [f"{word} {schema[key]}" for key, word in LIMITS.items() if key in schema]
    return ", ".join([schema.get("format") or schema.get("type") or "anything", *limits])


LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minLength": "length ≥",
    "maxLength": "length ≤",
}


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ").strip()
