"""The chart, rendered by Helm's own engine, and what its objects say to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "deploy/helm/cwpo"
NAMESPACE = "team"

Object = dict[str, Any]
Option = tuple[str, str]


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def rendered(values: Object, name: str = "demo") -> list[Object]:
    """The objects of a release; the values are validated as an installation would."""
    chart().validate_schema(values)
    manifests = chart().render(values, name=name, namespace=NAMESPACE)
    texts = [text for path, text in manifests.items() if path.endswith(".yaml")]
    return [item for text in texts for item in yaml.safe_load_all(text) if item]


def every_pair(axes: dict[str, dict[str, Object]]) -> Iterator[dict[str, str]]:
    """Choices of one option on each axis, such that any two options of two axes meet in one.

    Args:
        axes: the options of each axis, of which only the names matter.
    """
    options = [(axis, option) for axis, names in axes.items() for option in names]
    missing = {frozenset(pair) for pair in combinations(options, 2) if pair[0][0] != pair[1][0]}
    while missing:
        choice = set(min(missing, key=sorted))
        for axis, names in axes.items():
            if axis not in dict(choice):
                choice.add(max([(axis, name) for name in names], key=_gain(choice, missing)))
        missing -= {frozenset(pair) for pair in combinations(choice, 2)}
        yield {axis: dict(choice)[axis] for axis in axes}


def _gain(choice: set[Option], missing: set[frozenset[Option]]) -> Callable[[Option], int]:
    """How many of the missing pairs an option would add to the choice."""
    return lambda option: sum(option in pair and pair <= choice | {option} for pair in missing)


def merged(*values: Object) -> Object:
    """Values, of which later ones take precedence, as with several files of `helm --values`."""
    result: Object = {}
    for layer in values:
        for name, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(name), dict)
            result[name] = merged(result[name], value) if both else value
    return result


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [item for item in of_kind(objects, kind) if item["metadata"]["name"] == name]
    return found


def pods(objects: list[Object]) -> list[Object]:
    """The pods of all workloads: metadata and spec."""
    templates = of_kind(objects, "Deployment", "StatefulSet", "Job")
    return [*of_kind(objects, "Pod"), *(item["spec"]["template"] for item in templates)]


def pod_specs(objects: list[Object]) -> list[Object]:
    return [pod["spec"] for pod in pods(objects)]


def containers(objects: list[Object]) -> list[Object]:
    """Those of all workloads, init containers too."""
    parts = [(pod.get("initContainers", []), pod["containers"]) for pod in pod_specs(objects)]
    return [container for part in parts for container in chain(*part)]


def selected(objects: list[Object], labels: dict[str, str]) -> list[Object]:
    """The pods that have these labels."""
    return [pod for pod in pods(objects) if labels.items() <= pod["metadata"]["labels"].items()]


def env(objects: list[Object], deployment: str) -> dict[str, Object]:
    spec = named(objects, "Deployment", deployment)["spec"]["template"]["spec"]
    return {variable["name"]: variable for variable in spec["containers"][0]["env"]}


def named_ports(pod: Object) -> dict[str, int]:
    """The numbers of a pod's ports, by their names."""
    ports = chain.from_iterable(c.get("ports", []) for c in pod["spec"]["containers"])
    return {entry["name"]: entry["containerPort"] for entry in ports}


def port_number(pod: Object, port: int | str) -> int:
    """The number of a pod's port, which may be given by its name."""
    if isinstance(port, int):
        return port
    return named_ports(pod)[port]


def behind(objects: list[Object], service: str, port: int | str) -> list[tuple[Object, int]]:
    """The pods that a port of a Service leads to, each with the number of its own port."""
    spec = named(objects, "Service", service)["spec"]
    (entry,) = [p for p in spec["ports"] if port in (p["port"], p["name"])]
    return [
        (pod, port_number(pod, entry["targetPort"])) for pod in selected(objects, spec["selector"])
    ]
