"""`cwpo model`, and the method of the SDK behind it."""

from __future__ import annotations

import json

import pytest

from cwpo import Triplet, cli
from cwpo.commands.model import Model
from cwpo.errors import CwpoError
from cwpo.types import ModelRef
from cwpo_annotator import Annotator
from harness import serving

QUESTION = {"prompt": "Where is Paris?", "response_a": "In France.", "response_b": "No idea."}


def loaded(name):
    """The null annotator under another name."""
    annotator = Annotator.null()
    annotator.model = ModelRef(name=name, revision="1")
    return annotator


@pytest.fixture
def service(monkeypatch):
    with serving(loader=loaded) as running:
        monkeypatch.setenv("CWPO_URL", running.url)
        yield running


def golden(path, *, preferred):
    path.write_text(json.dumps(QUESTION | {"preferred": preferred}) + "\n")
    return path


def test_an_annotator_takes_over_that_labels_as_people_do(service, tmp_path, capsys):
    (label,) = Annotator.null().annotate([Triplet(**QUESTION)])
    right = golden(tmp_path / "right.jsonl", preferred=label.preferred)
    wrong = golden(tmp_path / "wrong.jsonl", preferred={"a": "b", "b": "a"}[label.preferred])
    with pytest.raises(SystemExit, match=r"golden\[0\]: next prefers"):
        cli.run(Model, ["change", "next", "--golden", str(wrong)], "cwpo model")
    cli.run(Model, ["show"], "cwpo model")
    assert capsys.readouterr().out.startswith("null ")
    cli.run(Model, ["change", "next", "--golden", str(right)], "cwpo model")
    assert capsys.readouterr().out == "next 1\n"
    cli.run(Model, ["show", "--json"], "cwpo model")
    assert json.loads(capsys.readouterr().out)["name"] == "next"


def test_clients_change_the_model(service, use):
    changed = use(service.url, lambda client: client.change_model("next"))
    assert changed.name == "next"
    assert changed.replica
    assert use(service.url, lambda client: client.model()).name == "next"
    with pytest.raises(CwpoError, match="the model cannot be changed: annotator"):
        use(service.url, lambda client: client.change_model(""))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps(QUESTION), "row 1: preferred"),
        ("{", "row 1"),
        (json.dumps(QUESTION | {"preferred": "tie"}), "row 1: preferred"),
        ("\n".join([json.dumps(QUESTION | {"preferred": "a"})] * 257), "257 triplets"),
    ],
)
def test_what_is_no_golden_triplet_is_named(text, reason, tmp_path):
    file = tmp_path / "golden.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(SystemExit, match=reason):
        cli.run(Model, ["change", "anything", "--golden", str(file)], "cwpo model")
