"""The locks hold what the parts require, the same everywhere, and nothing of one registry."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
IMAGES = {
    "worker": ["client", "worker"],
    "service": ["client", "annotator", "worker", "service"],
    "trainer": ["client", "annotator", "trainer"],
    "ray": ["client", "annotator", "worker"],
}
# The parts themselves, and what is chosen by the accelerator.
APART = re.compile(r"cwpo(-.*)?|torch")


def locked(name):
    """The locked requirements by name, each with its number of hashes."""
    text = (ROOT / "locks" / f"{name}.txt").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=sha256:")
        parsed = Requirement(requirement)
        found[canonicalize_name(parsed.name)] = (parsed, len(hashes))
    return found


def required(part):
    project = tomllib.loads((ROOT / part / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    return [one for one in requirements if not APART.fullmatch(one.name)]


def version(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize("name", ["dev", "models", "uv", "build", *IMAGES])
def test_every_version_is_exact_and_has_its_hashes(name):
    entries = locked(name)
    assert entries
    for requirement, hashes in entries.values():
        assert version(requirement)
        assert hashes


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_no_lock_names_a_registry(path):
    assert "://" not in path.read_text()


@pytest.mark.parametrize(("image", "parts"), [*IMAGES.items(), ("dev", IMAGES["service"])])
def test_a_lock_holds_what_its_parts_accept(image, parts):
    entries = locked(image)
    for part in parts:
        for requirement in required(part):
            known, _ = entries[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version(known)), (part, requirement.name)


@pytest.mark.parametrize("name", ["build", "uv", *sorted(IMAGES.keys() - {"ray"})])
def test_all_locks_have_the_versions_that_are_tested_together(name):
    tested, entries = locked("dev"), locked(name)
    if name == "build":
        # What lists the content of the images is of no use elsewhere.
        entries = {key: entry for key, entry in entries.items() if key in tested}
    assert {key: version(known) for key, (known, _) in entries.items()} == {
        key: version(tested[key][0]) for key in entries
    }
