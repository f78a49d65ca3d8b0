"""Confidence-weighted preference optimisation: types, SDK and datasets."""

from cwpo.async_client import AsyncClient
from cwpo.client import Client
from cwpo.errors import CwpoError
from cwpo.types import (
    Annotation,
    FailedAnnotation,
    Job,
    Message,
    Ranking,
    RankItem,
    Triplet,
)

__all__ = [
    "Annotation",
    "AsyncClient",
    "Client",
    "CwpoError",
    "FailedAnnotation",
    "Job",
    "Message",
    "RankItem",
    "Ranking",
    "Triplet",
]
