"""Whether a judge is independent of the policies that it judges.

A policy is trained to please the annotator that labelled its data. That this annotator prefers its
answers says that training worked, and nothing of what others make of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from cwpo.errors import ConfigError
from cwpo_annotator.checkpoint import resolve, revisions
from cwpo_trainer.data.weighted import read_annotator
from cwpo_trainer.run.folder import ADAPTER_FOLDER, RECORD_NAME, read_record


class Independence(BaseModel):
    """What is known of the judge's part in the training of policies.

    labelled: the models whose training data it labelled, and "data" where it labelled the prompts'.
    unknown: the models that do not tell who labelled their data.
    """

    labelled: list[str]
    unknown: list[str]


def check_independence(
    judge: str, models: Mapping[str, str], data: str, *, allowed: bool
) -> Independence:
    """Find what the judge labelled.

    Args:
        models: folders or Hub ids of the policies and of their reference, by name.
        data: that of the evaluation.
        allowed: whether the judge may have labelled some of it.
    Raises: ConfigError where it may not and has.
    """
    own = revisions(resolve(judge))
    labellers = {name: labelled_by(Path(path)) for name, path in models.items()}
    if Path(data).exists():
        annotator = read_annotator(Path(data))
        labellers["data"] = "" if annotator is None else annotator.revision
    found = Independence(
        labelled=[name for name, revision in labellers.items() if revision in own],
        unknown=[name for name, revision in labellers.items() if revision is None],
    )
    if found.labelled and not allowed:
        raise ConfigError(
            f"--judge: {judge} labelled the data of {', '.join(found.labelled)}, so that it is no "
            "judge of them: name another reward model, or say --allow-annotator-as-judge"
        )
    return found


def labelled_by(model: Path) -> str | None:
    """Revision of the annotator that labelled a policy's training data; empty if people did.

    Returns: None for a policy that does not tell: one from elsewhere, or trained on JSONL.
    """
    folder = model.parent if model.name == ADAPTER_FOLDER else model
    if not (folder / RECORD_NAME).is_file():
        return None
    record = read_record(folder)
    if record.settings.get("labels") == "human":
        return ""
    annotator = record.results.get("annotator")
    revision = annotator.get("revision") if isinstance(annotator, dict) else None
    return revision if isinstance(revision, str) else None
