"""The annotator checkpoint: a Hugging Face model folder plus annotator.json.

With the objectives bt and pairrm the model is a sequence-classification one of one output. With
dpo and sft+dpo it is a causal language model, and its reference stands in the folder `reference`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cwpo.errors import CwpoError

CARD_NAME = "annotator.json"
REFERENCE_NAME = "reference"
_CHUNK = 1 << 22

Objective = Literal["bt", "dpo", "sft+dpo", "pairrm"]
IMPLICIT: tuple[Objective, ...] = ("dpo", "sft+dpo")


class CheckpointError(CwpoError):
    """A folder or Hub id is no annotator that can be loaded; says why and what would be."""


class HeldOut(BaseModel):
    """How the annotator did on pairs that it was neither trained nor calibrated on."""

    model_config = ConfigDict(extra="forbid")

    pairs: int
    accuracy: float
    mean_confidence: float
    ece: float | None = Field(None, description="expected calibration error of confidence")
    calibrated_ece: float | None = Field(None, description="the same of calibrated confidence")


class EncodingSpec(BaseModel):
    """What fixes how prompt and response become token ids, beside the tokenizer itself."""

    model_config = ConfigDict(extra="forbid")

    join: str = Field("\n\n", description="put between a text prompt and its response")
    max_length: int = Field(gt=1, description="tokens a text, prompt and response together")
    pad_token: str = Field(description="a token of its own, never the end of sequence")


class Card(BaseModel):
    """annotator.json: how texts were encoded in training, and what is known of the result."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    base_model: str | None = None
    objective: Objective | None = Field(None, description="none is a scalar head, as of bt")
    beta: float | None = Field(None, gt=0, description="of the implicit reward, eq. 17")
    encoding: EncodingSpec
    data_fingerprint: str | None = None
    labelled_pairs: int | None = None
    held_out: HeldOut | None = None
    temperature: float | None = Field(None, gt=0, description="calibration temperature")
    calibration_pairs: int | None = Field(
        None, description="labelled pairs kept out of training to fit the temperature on"
    )
    confidence_quantiles: list[float] | None = Field(
        None, description="of held-out confidence at 0, 0.1, ..., 1"
    )

    @model_validator(mode="after")
    def _has_beta(self) -> Self:
        if (self.beta is not None) != (self.objective in IMPLICIT):
            raise ValueError("beta belongs to the objectives dpo and sft+dpo, which need it")
        return self


def read_card(folder: Path) -> Card | None:
    """The card in the folder, None where there is none.

    Raises: CheckpointError for one that this version cannot read.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        raise CheckpointError(f"{path}: {place}: {first['msg']}") from error


def write_card(folder: Path, card: Card) -> None:
    """Write annotator.json into the folder."""
    (folder / CARD_NAME).write_text(card.model_dump_json(indent=2, exclude_none=True) + "\n")


def resolve(model: str | Path) -> Path:
    """The local folder of a checkpoint: the folder itself, or a download of the Hub id.

    Raises: CheckpointError when there is no such folder and the Hub has or gives none.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{model}: the folder has no config.json, so it is no model")
        return folder
    name = str(model)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{model}: no such folder (and a Hub id looks like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model}: neither a folder nor a model that the Hub gives: {reason}"
        ) from error


def revision(folder: Path) -> str:
    """What tells this checkpoint from any other: 12 hex digits over its weights and its card."""
    digest = hashlib.sha256()
    files = sorted([*folder.glob("*.safetensors"), folder / CARD_NAME, folder / "config.json"])
    for path in (*files, *sorted(folder.glob(f"{REFERENCE_NAME}/*.safetensors"))):
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()[:12]


def outputs(folder: Path) -> int:
    """How many scores the model's head has. Raises: CheckpointError if it has no such head."""
    config = json.loads((folder / "config.json").read_text())
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise CheckpointError(
            f"{folder}: {', '.join(architectures) or 'an unnamed architecture'} has no scalar "
            "head; train one with `cwpo train-annotator --model` on it"
        )
    labels = config.get("id2label")
    return len(labels) if labels else int(config.get("num_labels", 2))
