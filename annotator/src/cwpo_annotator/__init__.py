"""The annotator: encoding, scores, labels and confidence."""

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.checkpoint import CheckpointError

__all__ = ["Annotator", "CheckpointError"]
