"""Writes the table of values in the chart's README from the chart's schema and defaults.

python deploy/helm/values_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "cwpo"
README = CHART / "README.md"
TITLE = "## Values\n"


def readme() -> str:
    """The README, whose last section is written anew."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    kept = README.read_text().partition(TITLE)[0].rstrip("\n")
    table = ["| value | default | meaning |", "|---|---|---|", *_rows(schema, schema, defaults, ())]
    note = "Written by `make chart-readme` from `values.schema.json` and `values.yaml`."
    return "\n".join([kept, "", TITLE, note, "", *table]) + "\n"


def _rows(
    root: dict[str, Any], schema: dict[str, Any], values: dict[str, Any], path: tuple[str, ...]
) -> Iterator[str]:
    """A row for each value, and for each object whose names are the user's."""
    for name, default in values.items():
        entry = schema["properties"][name]
        if "$ref" in entry:
            entry = {**root["$defs"][entry["$ref"].rpartition("/")[2]], **entry}
        if "properties" in entry:
            yield from _rows(root, entry, default, (*path, name))
        else:
            meaning = entry["description"].replace("|", "\\|")
            yield f"| `{'.'.join((*path, name))}` | `{json.dumps(default)}` | {meaning} |"


if __name__ == "__main__":
    README.write_text(readme())
