"""`cwpo fetch`: copies of annotators that are the ones that are meant."""

from __future__ import annotations

import fsspec
import pytest

from cwpo import cli
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import CheckpointError, revisions
from cwpo_annotator.commands import Fetch
from cwpo_annotator.fetched import fetch

REVISION = "0123456789ab"


@pytest.fixture
def bucket(tiny_annotator):
    """The URL of the annotator in an object store."""
    files = fsspec.filesystem("memory")
    files.put(f"{tiny_annotator}/", "/bucket/annotator/", recursive=True)
    yield "memory://bucket/annotator"
    files.rm("/bucket", recursive=True)


def test_a_copy_is_the_same_annotator(bucket, tiny_annotator, tmp_path, capsys):
    folder, revision = tmp_path / "models" / "annotator", revisions(tiny_annotator).current
    cli.run(Fetch, [bucket, str(folder), "--revision", revision], "cwpo fetch")
    assert capsys.readouterr().out == f"{folder}: {revision}\n"
    assert Annotator.load(str(folder)).model.revision == revision
    assert [path.name for path in folder.parent.iterdir()] == ["annotator"]
    # A container that is started again finds it there.
    fsspec.filesystem("memory").rm("/bucket/annotator/config.json")
    assert fetch(bucket, folder, revision=revision) == revision


def test_another_annotator_is_not_kept(bucket, tiny_annotator, tmp_path):
    folder = tmp_path / "annotator"
    with pytest.raises(SystemExit, match=f"not {REVISION}"):
        cli.run(Fetch, [bucket, str(folder), "--revision", REVISION], "cwpo fetch")
    assert [*tmp_path.iterdir()] == []
    fetch(str(tiny_annotator), folder, revision=None)
    with pytest.raises(CheckpointError, match=f"not {REVISION}"):
        fetch(bucket, folder, revision=REVISION)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("memory://bucket/nothing", "no config.json|cannot be read"),
        ("strange://bucket/annotator", "cannot be read"),
        ("/nowhere", "no such folder"),
    ],
)
def test_what_cannot_be_read_leaves_nothing(source, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        fetch(source, tmp_path / "annotator", revision=None)
    assert [*tmp_path.iterdir()] == []
