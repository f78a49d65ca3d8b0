from __future__ import annotations

import pytest

from cwpo.errors import ConfigError
from cwpo_annotator.checkpoint import revisions
from cwpo_trainer.evaluation.independence import check_independence, labelled_by
from cwpo_trainer.run.folder import new_run_folder


@pytest.fixture
def trained(tmp_path):
    """`trained("dpo", labels, revision)`: the folder of a policy with its run.json."""

    def make(name, labels="annotator", revision=None):
        with new_run_folder("align", tmp_path / name, {"labels": labels}) as made:
            if revision is not None:
                made.results["annotator"] = {"name": "a", "revision": revision}
        return tmp_path / name

    return make


def test_a_policy_tells_who_labelled_its_data(trained, tmp_path):
    assert labelled_by(trained("cw-dpo", revision="abc")) == "abc"
    assert labelled_by(tmp_path / "cw-dpo" / "adapter") == "abc"
    assert labelled_by(trained("human", "human")) == ""
    assert labelled_by(trained("jsonl")) is None
    assert labelled_by(tmp_path / "owner" / "name") is None


def test_a_judge_by_any_of_its_revisions_is_known(trained, tiny_annotator):
    current, former = revisions(tiny_annotator)
    models = {
        "now": str(trained("now", revision=current)),
        "before": str(trained("before", revision=former)),
        "other": str(trained("other", revision="0123456789ab")),
        "human": str(trained("human", "human")),
        "reference": "owner/name",
    }
    with pytest.raises(ConfigError, match="labelled the data of now, before, so"):
        check_independence(str(tiny_annotator), models, "owner/data", allowed=False)
    found = check_independence(str(tiny_annotator), models, "owner/data", allowed=True)
    assert found.labelled == ["now", "before"]
    assert found.unknown == ["reference"]
