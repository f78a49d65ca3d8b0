"""The annotator as a model: encode, score, label and confidence."""

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.checkpoint import CheckpointError

__all__ = ["Annotator", "CheckpointError"]
