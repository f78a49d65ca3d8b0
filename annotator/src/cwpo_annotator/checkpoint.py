"""The annotator checkpoint: a Hugging Face model folder plus annotator.json.

With the objectives bt and pairrm the model is a sequence-classification one of one output. With
dpo and sft+dpo it is a causal language model, and its reference stands in the folder `reference`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cwpo.errors import CwpoError

CARD_NAME = "annotator.json"
REFERENCE_NAME = "reference"
ADAPTER_NAME = "adapter_config.json"
INT8_AGREEMENT = 0.99
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
    eos: bool = Field(
        True,
        description="texts end with EOS; false for a reward model whose head was padded with EOS, "
        "and so learnt to read the token before it",
    )


class Int8Check(BaseModel):
    """How far int8 gave the labels of float32, found out before it is offered."""

    model_config = ConfigDict(extra="forbid")

    agreement: float = Field(ge=0, le=1, description="share of the pairs with the same label")
    pairs: int = Field(description="of the calibration sample")
    sample_sha256: str


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
    int8: Int8Check | None = None
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


def require_int8(folder: Path) -> None:
    """Make sure that the checkpoint's labels in int8 were found to be those of float32.

    Raises: CheckpointError, with the way to do that.
    """
    card = read_card(folder)
    if card is None or card.int8 is None or card.int8.agreement < INT8_AGREEMENT:
        raise CheckpointError(
            f"{folder}: its labels in int8 have not been compared with those of float32; `cwpo "
            f"quantize --annotator {folder} --calibration FILE --output DIR` does that, and "
            "writes the folder to load in int8"
        )


def resolve(model: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint: the folder itself, or a download of the Hub id.

    Args:
        weights: download them too, not only configuration and tokenizer.
    Raises: CheckpointError when there is no such folder and the Hub has or gives none.
    """
    folder = Path(model)
    if folder.is_dir():
        if not ((folder / "config.json").is_file() or is_adapter(folder)):
            raise CheckpointError(f"{model}: the folder has no config.json, so it is no model")
        return folder
    name = str(model)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{model}: no such folder (and a Hub id looks like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(
            snapshot_download(name, allow_patterns=[*patterns, *["*.safetensors"] * weights])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model}: neither a folder nor a model that the Hub gives: {reason}"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter, which needs the base model that it names."""
    return (folder / ADAPTER_NAME).is_file() and not (folder / "config.json").is_file()


def base(folder: Path) -> Path:
    """The folder of the model itself: of the adapter's base model, or the same folder.

    Raises: CheckpointError where the adapter's base model is not to be found.
    """
    if not is_adapter(folder):
        return folder
    name = _json(folder / ADAPTER_NAME).get("base_model_name_or_path")
    try:
        return resolve(str(name))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: the adapter's base model: {error}") from error


def revision(folder: Path) -> str:
    """What tells this checkpoint from any other: 12 hex digits over its weights and its card."""
    digest = hashlib.sha256()
    names = (CARD_NAME, "config.json", ADAPTER_NAME)
    for part in dict.fromkeys((folder, base(folder), folder / REFERENCE_NAME)):
        for path in sorted([*part.glob("*.safetensors"), *(part / name for name in names)]):
            if path.is_file():
                digest.update(path.name.encode())
                with path.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        digest.update(chunk)
    return digest.hexdigest()[:12]


def check(folder: Path) -> None:
    """Make sure, before anything is loaded, that the folder can hold an annotator.

    Raises: CheckpointError for a model that needs code of its own, weights in pickle, a model
        without a scalar head or with more than one output; a language model without reference.
    """
    card = read_card(folder)
    is_implicit = card is not None and card.objective in IMPLICIT
    other = folder / REFERENCE_NAME if is_implicit else base(folder)
    for part in dict.fromkeys((folder, other)):
        _refuse_remote_code(part)
        _refuse_pickle(part)
    if is_adapter(folder) or is_implicit:
        return
    config = _json(folder / "config.json")
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise CheckpointError(
            f"{folder}: {', '.join(architectures) or 'an unnamed architecture'} has no scalar "
            "head; train one with `cwpo train-annotator --model` on it"
        )
    labels = config.get("id2label")
    count = len(labels) if labels else int(config.get("num_labels", 2))
    if count != 1:
        raise CheckpointError(
            f"{folder}: the head has {count} outputs; an annotator has one score (num_labels=1)"
        )


def _refuse_remote_code(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in _json(folder / name):
            raise CheckpointError(
                f"{folder}: {name} asks for code that comes with the model (auto_map), and such "
                "code is never run; save the model as one of transformers' own architectures, or "
                "delete auto_map if it is one"
            )


def _refuse_pickle(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    found = ", ".join(path.name for path in sorted(folder.glob("*.bin"))) or "none"
    raise CheckpointError(
        f"{folder}: no weights in safetensors (pickle weights: {found}; reading those can run "
        "code); load them where you trust them and save them again with save_pretrained"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value
