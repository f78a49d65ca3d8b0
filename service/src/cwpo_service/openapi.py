"""Writes the REST contract: `python -m cwpo_service.openapi openapi/openapi.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cwpo_annotator.annotator import Annotator
from cwpo_service.app import create_app
from cwpo_service.settings import ServeSettings


def render() -> str:
    """The OpenAPI document as JSON; the same code always produces the same text."""
    app = create_app(ServeSettings(backend="null"), Annotator.null)
    return json.dumps(app.openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render())
