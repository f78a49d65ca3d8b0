"""What a model was trained from, as far as others can find it: on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load

from cwpo.errors import CwpoError
from cwpo_annotator.checkpoint import base_name, is_adapter, resolve
from cwpo_trainer.run.folder import README_NAME, RECORD_NAME, read_record

_LICENCE_FIELDS = ("license", "license_name", "license_link")


class Origin(NamedTuple):
    """A model that another was trained from.

    hub_id: of the model itself, or else of the nearest model on the Hub that it is known to come
        from; None where its folder names none.
    is_itself: whether hub_id is that of the model itself.
    licence: the fields of its card that state its licence; empty without a card.
    """

    hub_id: str | None
    is_itself: bool
    licence: Mapping[str, str]

    @property
    def described(self) -> str:
        """The model by its id on the Hub, or as one that comes from there, in Markdown."""
        if self.hub_id is None:
            return "a model that is not on the Hub"
        link = f"[{self.hub_id}](https://huggingface.co/{self.hub_id})"
        return link if self.is_itself else f"a model that comes from {link}"


def origin(model: str) -> Origin:
    """Where a model comes from, by its card and, of one that was trained here, its run.json.

    Args:
        model: folder or Hub id.
    """
    if not Path(model).is_dir():
        return Origin(model, True, _licence(_metadata(resolve(model, weights=False))))
    folder = Path(model)
    fields = _metadata(folder)
    licence = _licence(fields)
    repository = _repository(folder)
    if repository is not None:
        return Origin(repository, True, licence)
    named = fields.get("base_model")
    if isinstance(named, list):
        named = next(iter(named), None)
    if not isinstance(named, str) and is_adapter(folder):
        base = origin(base_name(folder))
        return Origin(base.hub_id, False, licence or base.licence)
    return Origin(named if isinstance(named, str) else None, False, licence)


def _repository(folder: Path) -> str | None:
    """The Hub repository that the run which wrote the folder uploaded it to, if any."""
    if not (folder / RECORD_NAME).is_file():
        return None
    try:
        repository = read_record(folder).settings.get("push_to_hub")
    except CwpoError:
        return None
    return repository if isinstance(repository, str) else None


def _licence(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: fields[name] for name in _LICENCE_FIELDS if isinstance(fields.get(name), str)}


def _metadata(folder: Path) -> dict[str, Any]:
    """The fields of a card; none of one that is missing or cannot be read."""
    try:
        fields = metadata_load(folder / README_NAME)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return fields or {}
