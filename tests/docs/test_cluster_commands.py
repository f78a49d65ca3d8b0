"""What the docs tell to type for a cluster: values of the chart, and manifests that are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import manifests
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "helm" / "cwpo" / "README.md"]
BLOCK = re.compile(r"(?ms)^```sh\n(.*?)^```")
# What a release has that is upgraded.
BEFORE = {"annotator": {"model": "acme/annotator"}}


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """The page, and the words after the program's name."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            # A hash, as of a key that nobody has yet.
            text = re.sub(r"\$\(.*?\)", "ab" * 32, block.replace("\\\n", " "))
            for line in re.findall(rf"(?m)^{program} .*$", text):
                yield page.name, shlex.split(line, comments=True)[1:]


def values_of(words: list[str]) -> dict[str, Any]:
    """The values of all --set flags, as Helm reads them."""
    values: dict[str, Any] = {}
    for flag, setting in pairwise(words):
        if flag != "--set":
            continue
        path, _, text = setting.partition("=")
        *above, last = path.split(".")
        place = values
        for name in above:
            place = place.setdefault(name, {})
        is_list = text.startswith("{")
        place[last] = text.strip("{}").split(",") if is_list else yaml.safe_load(text)
    return values


INSTALLED = [(page, words) for page, words in commands("helm") if "deploy/helm/cwpo" in words]


def test_there_are_commands():
    assert len(INSTALLED) >= 9


@pytest.mark.parametrize(("page", "words"), INSTALLED)
def test_the_chart_takes_the_values_and_has_what_they_switch_on(page, words):
    is_new = words[0] == "install"
    before = {} if is_new else BEFORE
    objects = manifests.rendered(manifests.merged(before, values_of(words)))
    assert manifests.of_kind(objects, "Deployment")
    # Helm forgets values of before, unless it is told to keep them.
    assert is_new or {"--reuse-values", "--reset-then-reuse-values"} & {*words}


@pytest.mark.parametrize(("page", "words"), [*commands("kubectl")])
def test_every_manifest_is_there(page, words):
    for flag, path in pairwise(words):
        if flag == "-f":
            assert [*yaml.safe_load_all((ROOT / path).read_text())]
