"""Loads an annotator according to the settings."""

from __future__ import annotations

import shlex
from pathlib import Path

from cwpo.errors import CwpoError
from cwpo_annotator.annotator import Annotator
from cwpo_service.settings import AnnotatorSettings


def load_annotator(settings: AnnotatorSettings, name: str | None = None) -> Annotator:
    """Load an annotator on the backend that the settings choose.

    Args:
        name: checkpoint folder or Hub id; by default, the annotator in the settings.
    Raises: CheckpointError for a missing or malformed checkpoint; CwpoError if the vLLM server
        does not start or cannot be reached.
    """
    name = name or settings.annotator
    if settings.backend == "null" or name is None:
        return Annotator.null()
    if settings.backend == "torch":
        return Annotator.load(
            name, dtype=settings.dtype, device=settings.device, threads=settings.threads
        )
    if settings.vllm_url is not None:
        return Annotator.over_vllm(name, settings.vllm_url, dtype=settings.dtype)
    return _over_own_vllm(name, settings)


def _over_own_vllm(name: str, settings: AnnotatorSettings) -> Annotator:
    from cwpo_annotator.backends.vllm.server import VllmServer

    server = VllmServer(
        Path(settings.vllm_python or ""),
        name,
        dtype=settings.dtype,
        on_cpu=settings.device == "cpu",
        arguments=shlex.split(settings.vllm_arguments),
    )
    try:
        server.start()
        return Annotator.over_vllm(name, server.url, dtype=settings.dtype, server=server)
    except CwpoError:
        server.stop()
        raise
