"""The schemas that an API server has: those of Kubernetes, and those of custom resources."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

# The versions that clusters have today.
KUBERNETES = ("1.35", "1.36", "1.37")
# Groups below k8s.io that Kubernetes itself does not serve.
_CUSTOM = ("gateway.networking.k8s.io", "x-k8s.io")


def folder() -> Path:
    """The folder of published schemas; tests that need it are skipped without."""
    if "CWPO_CRD_DIR" not in os.environ:
        pytest.skip("CWPO_CRD_DIR is not set: name a folder of CustomResourceDefinitions")
    return Path(os.environ["CWPO_CRD_DIR"])


def is_custom(item: dict[str, Any]) -> bool:
    """Whether the object's kind comes with a CustomResourceDefinition."""
    group = item["apiVersion"].rpartition("/")[0]
    return group.endswith(_CUSTOM) or ("." in group and not group.endswith(".k8s.io"))


def check(item: dict[str, Any]) -> None:
    """Validate an object as strictly as `kubectl apply --validate=strict`.

    The CEL rules of custom resources are not evaluated.
    Raises: jsonschema.ValidationError or kubernetes_validate.ValidationError.
    """
    _check(json.dumps(item))


@cache
def _check(text: str) -> None:
    item = json.loads(text)
    if is_custom(item):
        _validator(folder(), item["kind"], item["apiVersion"]).validate(item)
    else:
        for version in KUBERNETES:
            kubernetes_validate.validate(item, version, strict=True)


def check_compose(document: dict[str, Any]) -> None:
    """Validate a compose file. Raises: jsonschema.ValidationError."""
    schema = json.loads((folder() / "compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(document)


@cache
def _validator(folder: Path, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    group, _, version = api_version.rpartition("/")
    for path in sorted(folder.glob(f"{group}_*.yaml")):
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        if spec["names"]["kind"] == kind:
            (found,) = [entry for entry in spec["versions"] if entry["name"] == version]
            schema = found["schema"]["openAPIV3Schema"]
            return jsonschema.Draft202012Validator(_closed(schema, is_root=True))
    raise FileNotFoundError(f"{folder} has no definition of {kind} ({api_version})")


def _closed(schema: dict[str, Any], *, is_root: bool = False) -> dict[str, Any]:
    """The structural schema as JSON schema, which refuses fields that an API server would prune."""
    result = dict(schema)
    if result.pop("x-kubernetes-int-or-string", False):
        result["type"] = ["integer", "string"]
        # They repeat the two types.
        result.pop("anyOf", None)
    if result.pop("nullable", False) and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    for name in ("items", "additionalProperties"):
        if isinstance(result.get(name), dict):
            result[name] = _closed(result[name])
    if "properties" in result:
        result["properties"] = {
            name: dict(value) if is_root and name == "metadata" else _closed(value)
            for name, value in result["properties"].items()
        }
        keeps_unknown = result.get("x-kubernetes-preserve-unknown-fields", False)
        if "additionalProperties" not in result and not keeps_unknown:
            result["additionalProperties"] = False
    return result
