"""The trainer's check of `cwpo doctor`: room for models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants

from cwpo import checks
from cwpo.findings import Finding, Places

# A model of 7B parameters in bfloat16.
FREE_BYTES = 16 * 10**9


def trainer(places: Places) -> Iterator[Finding]:
    """Room for models of the Hub."""
    yield from checks.disk("models of the Hub", Path(constants.HF_HUB_CACHE), FREE_BYTES, "HF_HOME")
