"""The annotator checkpoint: a Hugging Face model folder plus annotator.json.

With the objectives bt and pairrm, the model is a sequence-classification model with one output.
With dpo and sft+dpo, it is a causal language model, with its reference in the subfolder
`reference`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cwpo.errors import CwpoError, first_line, mistake_in
from cwpo.types import Certificate

CARD_NAME = "annotator.json"
REFERENCE_NAME = "reference"
ADAPTER_NAME = "adapter_config.json"
INT8_AGREEMENT = 0.99
# Reads two responses and answers which is better; SteamSHP is one.
COMPARER = "T5ForConditionalGeneration"
_CHUNK = 1 << 22
# What transformers' tokenizers read from a folder.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)

Objective = Literal["bt", "dpo", "sft+dpo", "pairrm"]
IMPLICIT: tuple[Objective, ...] = ("dpo", "sft+dpo")
ReadingName = Literal["chat_template", "text_pair", "steamshp"]


class CheckpointError(CwpoError):
    """A folder or Hub id is not a usable annotator; the message says why, and what to do."""


class CalibrationBin(BaseModel):
    """Held-out pairs of similar confidence: what it promises, (1 + C) / 2, and what it keeps."""

    model_config = ConfigDict(extra="forbid")

    pairs: int
    mean_confidence: float
    mean_calibrated_confidence: float | None = None
    accuracy: float


class HeldOut(BaseModel):
    """Accuracy and confidence on pairs that the annotator was neither trained nor calibrated on."""

    model_config = ConfigDict(extra="forbid")

    pairs: int
    accuracy: float
    mean_confidence: float
    ece: float | None = Field(None, description="Expected calibration error of confidence.")
    calibrated_ece: float | None = Field(
        None, description="Expected calibration error of calibrated confidence."
    )
    bins: list[CalibrationBin] | None = Field(
        None, description="Tenths of the pairs, the least confident first."
    )


class EncodingSpec(BaseModel):
    """How prompt and response become token ids, where the tokenizer does not determine it."""

    model_config = ConfigDict(extra="forbid")

    join: str = Field("\n\n", description="Text between a text prompt and its response.")
    max_length: int = Field(
        gt=1, description="Maximum number of tokens of a prompt together with its response."
    )
    pad_token: str = Field(
        description="Token that fills batches up; never the end-of-sequence token."
    )
    eos: bool = Field(
        True,
        description="Whether the end-of-sequence token follows each text. Not for a reward model "
        "that was trained with it as padding, and so reads its score at the token before.",
    )
    reading: ReadingName | None = Field(
        None,
        description="Form of the texts of a reward model from elsewhere, which ends them itself; "
        "without one, text prompts are joined to their responses by `join`.",
    )


class Int8Check(BaseModel):
    """How often int8 and float32 give the same label, measured before int8 is allowed."""

    model_config = ConfigDict(extra="forbid")

    agreement: float = Field(ge=0, le=1, description="Share of pairs with the same label.")
    pairs: int = Field(description="Number of pairs that were compared.")
    sample_sha256: str


class Card(BaseModel):
    """annotator.json: how texts were encoded in training, and measurements of the annotator."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    base_model: str | None = None
    objective: Objective | None = Field(
        None, description="Training objective; without one, a scalar head as of bt."
    )
    beta: float | None = Field(None, gt=0, description="Strength of the implicit reward, eq. 17.")
    encoding: EncodingSpec
    data_fingerprint: str | None = None
    labelled_pairs: int | None = None
    held_out: HeldOut | None = None
    temperature: float | None = Field(
        None, gt=0, description="Calibration temperature T of confidence."
    )
    calibration_pairs: int | None = Field(
        None, description="Number of labelled pairs kept out of training to fit T on."
    )
    int8: Int8Check | None = None
    confidence_quantiles: list[float] | None = Field(
        None, description="Quantiles of held-out confidence at 0, 0.1, ..., 1."
    )
    certificates: list[Certificate] | None = Field(
        None,
        description="Which labels can be trusted, on data exchangeable with the pairs they were "
        "found on; one for each max_error and delta.",
    )

    @model_validator(mode="after")
    def _has_beta(self) -> Self:
        if (self.beta is not None) != (self.objective in IMPLICIT):
            raise ValueError("beta belongs to the objectives dpo and sft+dpo, which need it")
        return self


def read_card(folder: Path) -> Card | None:
    """The card in the folder; None if there is none.

    Raises: CheckpointError for a card that this version cannot read.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path}: {mistake_in(error)}") from error


def write_card(folder: Path, card: Card) -> None:
    """Write annotator.json into the folder."""
    (folder / CARD_NAME).write_text(_written(card))


def keep_certificate(folder: Path, card: Card, certificate: Certificate) -> None:
    """Write annotator.json with the certificate, in place of one of its max_error and delta.

    It changes no label, and so not the revision either.
    """
    asked = (certificate.max_error, certificate.delta)
    others = [each for each in card.certificates or [] if (each.max_error, each.delta) != asked]
    write_card(folder, card.model_copy(update={"certificates": [*others, certificate]}))


def _written(card: Card) -> str:
    return card.model_dump_json(indent=2, exclude_none=True) + "\n"


def require_int8(folder: Path) -> None:
    """Check that the checkpoint's labels in int8 were compared with those in float32.

    Raises: CheckpointError, with the command that does so.
    """
    card = read_card(folder)
    if card is None or card.int8 is None or card.int8.agreement < INT8_AGREEMENT:
        raise CheckpointError(
            f"{folder}: whether int8 keeps this annotator's labels has not been checked; `cwpo "
            f"quantize --annotator {folder} --calibration FILE --output DIR` checks it, and "
            "writes the folder to load in int8"
        )


def resolve(model: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint: the folder itself, or a download of the Hub id.

    Args:
        weights: download them too, not only configuration and tokenizer.
    Raises: CheckpointError if there is no such folder, and none can be downloaded from the Hub; or
        for weights that this user may not read.
    """
    folder = Path(model)
    if folder.is_dir():
        if not ((folder / "config.json").is_file() or is_adapter(folder)):
            raise CheckpointError(f"{model}: the folder holds no model: it has no config.json")
        _check_readable(folder)
        return folder
    name = str(model)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{model}: no such folder (and a Hub id looks like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
    if weights:
        patterns.append("*.safetensors")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{model}: no such folder, and no such model on the Hub: {reason}"
        ) from error


def _check_readable(folder: Path) -> None:
    """Libraries write weights for their owner alone, and say of others' that they are not there."""
    for path in folder.glob("*.safetensors"):
        if not os.access(path, os.R_OK):
            raise CheckpointError(
                f"{path}: the user {os.getuid()} may not read it: `chmod a+r`, or run as its owner"
            )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter, which needs the base model that it names."""
    return (folder / ADAPTER_NAME).is_file() and not (folder / "config.json").is_file()


def base_name(folder: Path) -> str:
    """Folder or Hub id of an adapter's base model, as the adapter names it."""
    return str(_json(folder / ADAPTER_NAME).get("base_model_name_or_path"))


def base_folder(folder: Path, *, weights: bool = True) -> Path:
    """The folder of the model itself: of the adapter's base model, or the same folder.

    Args:
        weights: download them too, if the base model is on the Hub.
    Raises: CheckpointError if the adapter's base model cannot be found.
    """
    if not is_adapter(folder):
        return folder
    try:
        return resolve(base_name(folder), weights=weights)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: the adapter's base model: {error}") from error


class Revisions(NamedTuple):
    """What identifies a checkpoint by its content, wherever its folder is: 12 hex digits.

    current: of its weights, its card without certificates, and its tokenizer with the chat
        template.
    former: of its weights and its card, as versions up to 0.2 wrote it into datasets and jobs.
    """

    current: str
    former: str


def revisions(folder: Path) -> Revisions:
    """The revisions of the checkpoint; this reads all of its weights."""
    base = base_folder(folder)
    digest = hashlib.sha256()
    for part in dict.fromkeys((folder, base, folder / REFERENCE_NAME)):
        _add_files(digest, part, "*.safetensors", CARD_NAME, "config.json", ADAPTER_NAME)
    former = digest.hexdigest()
    for part in dict.fromkeys((folder, base)):
        _add_files(digest, part, *_TOKENIZER_FILES)
    return Revisions(digest.hexdigest()[:12], former[:12])


def _add_files(digest: hashlib._Hash, folder: Path, *patterns: str) -> None:
    """Add the names and contents of the files that match."""
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.is_file():
            digest.update(path.name.encode())
            if path.name == CARD_NAME and (card := read_card(path.parent)) and card.certificates:
                digest.update(_written(card.model_copy(update={"certificates": None})).encode())
                continue
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)


def check(folder: Path) -> None:
    """Check, before anything is loaded, that the folder can hold an annotator.

    Raises: CheckpointError for a model that needs its own code, weights in pickle, a model without
        a scalar head or with more than one output, and a language model without a reference.
    """
    card = read_card(folder)
    is_implicit = card is not None and card.objective in IMPLICIT
    other = folder / REFERENCE_NAME if is_implicit else base_folder(folder)
    for part in dict.fromkeys((folder, other)):
        _refuse_remote_code(part)
        _refuse_pickle(part)
    if is_adapter(folder) or is_implicit:
        return
    config = _json(folder / "config.json")
    architectures = config.get("architectures") or []
    if COMPARER in architectures:
        return
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
